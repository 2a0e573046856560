"""The description of each command, with an example."""

from typing import Any

EXAMPLES = {
    "train": "reca train show_o_512 data.images=photos run_dir=runs/photos",
    "status": "reca status runs/photos --field step",
    "check": "reca check bagel_7b --gpus 8 --gpu-memory 80GiB",
    "generate": "reca generate runs/photos --prompt 'a yellow broccoli' --out drawn",
    "edit": "reca edit runs/bagel --image cat.png --instruction 'make it red'",
    "answer": "reca answer runs/photos --image cat.png --question 'What is this?'",
    "best-of": "reca best-of runs/photos prompts.txt --candidates 4 --out kept",
    "export": "reca export runs/photos --out exported --card",
    "eval": "reca eval geneval runs/photos --judge owlv2:FOLDER --against base",
    "compare": "reca compare base runs/photos --out compared",
    "serve": "reca serve runs/photos --against base --port 8080",
    "demo": "reca demo --umm harmon --seeds 3",
    "study": "reca study seen --umm open_uni --seeds 0,1,5",
    "get": "reca get weights show_o_512",
    "get weights": "reca get weights show_o_512 --to weights",
    "get data": "reca get data llava-665k --to data",
    "get suite": "reca get suite dpg --to benchmarks",
    "data": "reca data check photos",
    "data check": "reca data check photos data.columns.caption=text --task t2i",
    "data view": "reca data view photos --recipe bagel_7b --count 20",
    "cache": "reca cache show_o_512 data.images=photos data.cache=features",
    "doctor": "reca doctor",
}


def about(command: str, text: str) -> dict[str, Any]:
    """Return the keywords of a command's parser that describe it in the list of commands and in its own help."""
    example = {"epilog": f"example: {EXAMPLES[command]}"} if command in EXAMPLES else {}
    return {"help": text, "description": text, **example}

"""Shapes of the four UMMs, scaled to fit 24 GiB on a CPU. Benchmarks take shapes from nowhere else."""

# rows, hidden, vocabulary, share of rows with a label; Show-o masks 2/pi of its codes on average
CROSS_ENTROPY = {
    "show_o_512": dict(rows=1024, vocabulary=58498, labelled=0.637),
    "harmon_i2t": dict(rows=256, vocabulary=151936, labelled=0.4),
}
LINEAR_CROSS_ENTROPY = {
    "show_o_512": dict(rows=2048, hidden=1024, vocabulary=58498, labelled=0.637),
    "show_o_narrow": dict(rows=1155, hidden=256, vocabulary=58498, labelled=0.637),
}
# open_uni's language model is frozen
CONCAT = {
    "show_o_512": dict(batch=4, text=130, visual=576, image=1024, hidden=2048, vocabulary=58498, trained=(False, True)),
    "open_uni_l": dict(batch=8, text=60, visual=256, image=0, hidden=1536, vocabulary=32000, trained=(False,)),
}
FLOW = {
    "open_uni": dict(sizes=[(32, 32, 32)] * 32, patch=1),
    "bagel": dict(sizes=[(16, 128, 128)] * 4 + [(16, 64, 96)] * 3, patch=2),
}
DIFFUSION = {
    "harmon_512": dict(samples=32 * 1024, channels=16, repeats=4),
    "harmon_hidden_rows": dict(samples=8 * 1024, channels=16, repeats=4),
}

"""Which backend runs an op, and why."""


def backend_report() -> str:
    return ""

"""Process management: signals, hang reports, worker processes, and what libraries print in them."""

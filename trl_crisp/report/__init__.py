"""Results in, figures and pages out. Never imports torch."""

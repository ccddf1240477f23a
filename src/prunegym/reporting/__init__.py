"""The report: one self-contained page about one run or several, from what their folders hold."""

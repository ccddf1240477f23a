"""Run folders: what a run is asked, what it leaves, and how it goes on."""

"""Run folders: prompt files, jobs, plans, journals, images and their records."""

"""Everything that talks to a Kubeflow server: profiles, preflight, submitting, schedules, runs and clean-up."""

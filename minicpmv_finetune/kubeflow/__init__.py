"""Everything that talks to a Kubeflow server: client, profile, preflight, submit, schedule, runs, gc."""

"""Which addresses of a profile are Services of the cluster."""

import pytest

from minicpmv_finetune.kubernetes_terms import service_of


@pytest.mark.parametrize(
    ("address", "service"),
    [
        ("http://ml-pipeline.kubeflow:8888", ("ml-pipeline", "kubeflow")),
        ("http://ml-pipeline.kubeflow.svc.cluster.local:8888", ("ml-pipeline", "kubeflow")),
        ("https://kubeflow.local", None),
        ("http://kubeflow.example.com", None),
        ("http://localhost:8888", None),
        ("http://127.0.0.1:8888", None),
        ("", None),
    ],
)
def test_only_the_name_of_a_service_is_taken_for_one(address: str, service: tuple[str, str] | None) -> None:
    assert service_of(address) == service

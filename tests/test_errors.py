"""What becomes an error of one line, and what does not."""

import pytest

from dsnet_jax.errors import InputError, writing_into


def test_an_object_store_whose_package_is_missing_is_told_with_the_extra():
    with (
        pytest.raises(
            InputError, match=r"^gs://b/out cannot be reached \(No gcsfs\): pip install -e '\.\[gcs\]' .* or pay"
        ),
        writing_into("gs://b/out", "pay"),
    ):
        raise ImportError("No gcsfs")


def test_a_missing_package_is_not_the_fault_of_a_folder_on_this_machine(tmp_path):
    with pytest.raises(ImportError, match="No matplotlib"), writing_into(tmp_path, "pay"):
        raise ImportError("No matplotlib")

"""The benchmarks as TFDS datasets, which a team prepares once in a directory or bucket. To prepare one, run

    pip install "pspnet_jax[train,prepare]"
    tfds build pspnet_ade20k --imports=pspnet_jax.data.builders --file_format=array_record \\
      --manual_dir=DOWNLOADS --data_dir=DATA

or, in Python and without further packages,

    import tensorflow_datasets as tfds
    import pspnet_jax.data.builders

    builder = tfds.builder("pspnet_ade20k", data_dir="DATA", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir="DOWNLOADS"))

and then train from it:

    python -m pspnet_jax.main --config configs/ade20k.py --config.dataset.name=tfds \\
      --config.dataset.tfds_name=pspnet_ade20k --config.dataset.root=DATA

DOWNLOADS holds the official archives of ADE20K, or of VOC and SBD, or the unpacked archives of any benchmark. Image files are
stored unchanged, labels as class indices.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from pspnet_jax import config as configs
from pspnet_jax import datasets
from pspnet_jax.data import sources
from pspnet_jax.data.tfds_source import dataset_info
from pspnet_jax.errors import MissingFileError

logger = logging.getLogger(__name__)


class _FileBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One benchmark, with the examples of `sources.Files` in the same order.

    Attributes:
      BENCHMARK: config.dataset.name.
      ARCHIVES: official archives, which are extracted if the manual directory holds them.
      SPLITS: splits to prepare.
      OPTIONAL: splits that are left out if their files are missing.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    BENCHMARK: ClassVar[str]
    ARCHIVES: ClassVar[tuple[str, ...]] = ()
    SPLITS: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:
        archives = f"{', '.join(self.ARCHIVES)}, or " if self.ARCHIVES else ""
        return f"--manual_dir must hold {archives}{datasets.EXPECTED_FILES[self.BENCHMARK]}."

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self, f"{self.BENCHMARK} for semantic segmentation, with class indices as labels.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        manual = epath.Path(dl_manager.manual_dir)
        archives = {name: manual / name for name in self.ARCHIVES if (manual / name).exists()}
        extracted = dl_manager.extract(archives) if archives else {}
        dataset = configs.base_config().dataset
        dataset.name, dataset.root, dataset.extra_root = self.BENCHMARK, *self._roots(manual, extracted)
        examples = {}
        for split in self.SPLITS:
            try:
                examples[split] = self._generate_examples(sources.open_source(dataset, split))
            except MissingFileError as error:
                if split not in self.OPTIONAL:
                    raise
                logger.warning("split %r is left out: %s", split, error)
        return examples

    def _roots(self, manual: epath.Path, extracted: Mapping[str, epath.Path]) -> tuple[str, str]:
        """Returns dataset.root and dataset.extra_root, given the directories that the archives were extracted to."""
        return str(extracted[self.ARCHIVES[0]] if extracted else manual), ""

    def _generate_examples(self, source: sources.Source) -> Iterator[tuple[int, dict[str, Any]]]:
        assert isinstance(source, sources.Files)
        for index, pair in enumerate(source.pairs):
            yield index, {"image": pair.image, "label": source.read(index)[1][..., None]}


class PspnetAde20k(_FileBuilder):
    BENCHMARK = "ade20k"
    ARCHIVES = ("ADEChallengeData2016.zip",)
    SPLITS = ("training", "validation")


class PspnetVoc2012(_FileBuilder):
    BENCHMARK = "voc2012"
    ARCHIVES = ("VOCtrainval_11-May-2012.tar", "benchmark.tgz")
    SPLITS = ("train", "val", "train_aug")
    OPTIONAL = ("train_aug",)

    def _roots(self, manual: epath.Path, extracted: Mapping[str, epath.Path]) -> tuple[str, str]:
        voc, sbd = (extracted.get(name, manual) for name in self.ARCHIVES)
        return str(voc), str(sbd) if (sbd / "benchmark_RELEASE").exists() else ""


class PspnetCityscapes(_FileBuilder):
    BENCHMARK = "cityscapes"
    SPLITS = ("train", "val", "train_extra")
    OPTIONAL = ("train_extra",)

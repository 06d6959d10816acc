"""AWQ's files (Lin et al., arXiv 2306.00978) in the form that AutoAWQ calls gemm, of four bits.

Of a matrix [out, in] `qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8] have codes of neighbouring rows
in one word, in an order of their own; `scales` is [groups, out].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from worker.model.config import ConfigReader
from worker.model.quant.matrix import QuantisedMatrix, neighbours
from worker.model.quant.reading import ignore_auto_round, num_groups, read, read_along_rows, read_group_size
from worker.model.quant.scheme import Quantisation
from worker.model.weights import Part, TensorSource

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours stands at each place of a word, the lowest bits being the first place."""
NUM_BITS = 4
HARMLESS_TEXT = """
quant_method method zero_point modules_to_not_convert do_fuse modules_to_fuse fuse_max_seq_len exllama_config backend
desc_act act_group_aware batch_size block_name_to_quantize cache_block_outputs damp_percent dataset dynamic lm_head
max_input_length meta model_seqlen module_name_preceding_first_block modules_in_block_to_quantize pad_token_id sym
tokenizer true_sequential
"""
"""How the file was made, and hints for others' kernels. What was not converted, and zeros, are in the tensors."""


@dataclass(frozen=True, slots=True)
class Awq:
    """`group_size` None is one group."""

    group_size: int | None

    @property
    def unit(self) -> int:
        return self.group_size or 1

    def has(self, source: TensorSource, module: str) -> bool:
        return source.has(module + ".qweight")

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        (num_rows, num_columns), columns = part.shape, part.columns
        assert columns is not None
        size = self.group_size or num_columns
        count = num_groups(num_columns, size)
        grouped = Part((num_rows, count), part.rows, range(count), is_transposed=True)
        return QuantisedMatrix(
            codes=read_along_rows(source, module + ".qweight", replace(part, is_transposed=True), NUM_BITS, ORDER),
            scale=read(source, module + ".scales", grouped),
            zero=read_along_rows(source, module + ".qzeros", grouped, NUM_BITS, ORDER).float(),
            groups=neighbours(num_columns, size)[columns.start : columns.stop],
            num_bits=NUM_BITS,
        )


def awq(config: ConfigReader) -> Quantisation:
    config.ignore(*HARMLESS_TEXT.split())
    config.require(pack_dtype="int32")
    ignore_auto_round(config)
    config.rename(w_bit="bits", q_group_size="group_size")
    config.choice("bits", (NUM_BITS,), NUM_BITS)
    for name in ("version", "format", "checkpoint_format"):
        config.choice(name, ("gemm",), "gemm")
    if config.get("backend") == "llm-awq":
        raise config.error("backend llm-awq packs its weights in another way; files of AutoAWQ in its version gemm run")
    scheme = Awq(read_group_size(config))
    return Quantisation("awq", scheme, unit=scheme.unit)

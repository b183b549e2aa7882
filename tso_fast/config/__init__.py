"""Settings: what there is (``settings``), what a value must be (``ranges``), what goes together (``checks``), and the
command line and YAML that say so (``parse``).
"""

from tso_fast.config.checks import check as check
from tso_fast.config.settings import AnnotateConfig as AnnotateConfig
from tso_fast.config.settings import AssessConfig as AssessConfig
from tso_fast.config.settings import CellConfig as CellConfig
from tso_fast.config.settings import EvalConfig as EvalConfig
from tso_fast.config.settings import GenerateConfig as GenerateConfig
from tso_fast.config.settings import JudgeConfig as JudgeConfig
from tso_fast.config.settings import PairsConfig as PairsConfig
from tso_fast.config.settings import PlanConfig as PlanConfig
from tso_fast.config.settings import ScoreConfig as ScoreConfig
from tso_fast.config.settings import TrainConfig as TrainConfig

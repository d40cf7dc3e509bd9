"""What can go wrong, as the user is told it: one paragraph and one exit code each.

Every error a user can cause or mend is one of these classes. The message says what is wrong, where, and what to
write instead; the command line prints it without a traceback and exits with `exit_code`.
"""


class HFedMoEError(Exception):
    """Base of every error that is told to the user in one paragraph (exit code 1 when nothing more precise fits)."""

    exit_code = 1


class ConfigError(HFedMoEError):
    """The configuration, or a command line, asks for something that does not exist or contradicts itself."""

    exit_code = 2


class DataError(HFedMoEError):
    """A dataset, file, column or partition cannot be used."""

    exit_code = 3


class ModelError(HFedMoEError):
    """A model cannot be loaded, upcycled or understood."""

    exit_code = 4


class CapacityError(HFedMoEError):
    """Clients do not fit the resources of the machine or cluster, or their own budget."""

    exit_code = 5


class ClusterError(HFedMoEError):
    """A Ray cluster cannot be reached, refuses the token, runs another version, or has lost nodes that clients need."""

    exit_code = 6


class TrainingError(HFedMoEError):
    """A run stopped: quorum lost, the same failure on many clients, or a round that did not train what it claims."""

    exit_code = 7


class CheckpointError(HFedMoEError):
    """A run directory or checkpoint is missing, damaged, or belongs to another configuration."""

    exit_code = 8


class TrackingError(HFedMoEError):
    """A tracking server, such as that of Weights & Biases, cannot be reached or does not take what it is sent."""

    exit_code = 9

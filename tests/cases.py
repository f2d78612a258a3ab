"""The faults that a run must survive, or whose end it must tell: docs/reliability.md.

A test is marked with the cases that it shows: @pytest.mark.case(7). `scripts/test.sh
--cases=results/faults.json` writes the tests' outcomes by case, of which scripts/results_table.py
makes that page's table.
"""

CASES = {  # number: (what happens to the run, what the run does)
    1: ("killed in the middle of a save", "goes on from the checkpoint before"),
    2: ("ends with an error right after a save began", "waits until it is on the disk"),
    3: ("SIGTERM", "ends the call of steps, saves, exits with 75; the same command goes on"),
    4: ("more signals during that save", "saves all the same"),
    5: ("SIGTERM to one of several hosts", "all save the same step and exit with 75"),
    6: (
        "a signal while it compiles or evaluates",
        "ends that first, and the steps that were compiled, then saves",
    ),
    7: ("bits flip in a checkpoint", "names it, sets it aside, takes the newest sound one"),
    8: ("a checkpoint's arrays are cut short or gone", "the same"),
    9: ("a checkpoint's JSON is damaged", "the same"),
    10: ("an empty folder that looks like a checkpoint", "passes it over"),
    11: ("foreign files among the checkpoints", "leaves them alone"),
    12: ("the disk fills up", "says so, keeps what is whole, goes on when there is room"),
    13: ("a folder that cannot be written", "says so before it begins"),
    14: ("no checkpoint is sound", "refuses to start over unless they are deleted"),
    15: ("the newest checkpoint is not the best", "keeps both"),
    16: ("an evaluation loss that is not a number", "never the best"),
    17: ("a loss or weights that are not finite", "exits with 3 and the step, or rolls back"),
    18: ("statistics that are not finite under a finite loss", "the same; never saved"),
    19: ("stopped after an epoch", "ends bit for bit as if it had not been"),
    20: ("stopped at any step, before the first, at the last", "the same"),
    21: ("killed again and again at random moments", "the same"),
    22: ("moves to another number of devices", "goes on with the same images in the same order"),
    23: (
        "a batch that does not divide",
        "refused with sizes that do; each image counts once",
    ),
    24: ("started again with another config", "refused, naming the field"),
    25: ("a checkpoint of another dtype", "refused, naming the array"),
    26: ("a checkpoint of another format or network", "refused, naming what differs"),
    27: ("a byte of the data differs", "refused, naming the file"),
    28: ("a download breaks off", "never taken for whole; the next try gets it all"),
    29: ("a pickle that would run code", "refused, nothing runs"),
    30: ("a hostile archive", "nothing is extracted; bombs are refused"),
    31: ("labels, shapes or splits that are not CIFAR-10's", "refused"),
    32: ("no network, no TLS", "says within ten seconds what to do; never without TLS"),
    33: ("a second trainer in the same folder", "refused, naming the first"),
    34: ("a damaged or missing compilation cache", "compiles anew"),
    35: ("no GPU where one was asked for, or no memory", "one sentence, exits with 2"),
    36: ("one of several hosts dies", "the others end; the same command goes on"),
    37: ("a scheduler's variables lie about", "does not look at them unless told to"),
    38: ("the log is torn, lost or from another time", "made again from the checkpoint"),
    39: ("a save is due while another is under way", "waits for it; loses none"),
    40: ("killed or signalled while it reports", "the result is written last, or made again"),
}

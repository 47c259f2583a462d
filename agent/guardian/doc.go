// Package guardian is the small process that puts a VM right when the agent
// cannot: because it was killed, stopped, frozen, starved, or hangs.
//
// # Why a process
//
// The arm sits between saving the device state and `cont`, so no single QMP write
// contains a pause: an agent that dies inside it leaves a stopped VM. The guardian
// is started before the first stop, in a session and cgroups of its own, and owns
// all it will need: pidfds of agent, QEMU and fault server, a duplicate of the
// agent's QMP socket (which it never reads before it takes over), and the control
// page. It opens and allocates next to nothing afterwards, and it never holds the
// write-protect descriptor.
//
// # The control page
//
// [Control] is one shared page of atomic words, each with one writer: the agent
// says what it is about to do before it does it, agent, fault server and guardian
// leave their heartbeats there. The page lives on tmpfs beside the state file, so
// that what was under way is known even if agent and guardian die together; see
// [Release].
//
// The agent's side of a pause, in this order:
//
//	beat, Engaged=1 | prearm ... | Running=1 if it runs, Stopped=1 | stop, save,
//	re-arm, cont | Stopped=0 once cont is acknowledged | ... | Engaged=0
//
// # Life cycle
//
// [Start] returns when the child says that it watches. While Engaged it takes over
// when the agent dies or leaves no beat for 500 ms; while not Engaged an agent that
// dies ends the guardian too, and a missing beat means nothing. Taking over:
// SIGKILL for the agent (moved out of a frozen or starved cgroup if it does not die), the
// same for a fault server that does not leave by itself, SIGCONT if QEMU may have been
// stopped by a signal of ours (again when the fault server has ended, for until then it
// may be stopped once more), QMP brought back in step, `cont` if the agent had
// stopped a running VM and it is still paused, descriptors that an interrupted
// injection left in QEMU closed, and a look at smaps for what stays
// write-protected. It then writes a report and exits. The agent is killed even if
// it hangs in the kernel: nothing here waits for it for long.
//
// A fault server that gives no sign of life for Config.ServerStall while Engaged
// is killed: the kernel then drops the protection, and the checkpoint is lost. However
// it ends, what it had stopped goes on at once.
//
// # Through libvirt
//
// The monitor of a libvirt domain is reached through the daemon, which lets many
// clients in: the guardian opens a connection of its own before it says that it
// watches, and [Start] fails without. libvirt carries out what a dead agent had
// sent, in no order with what the guardian sends: a machine found running is
// watched for half a second more. If the daemon is gone, its monitor is free, and
// is used to resume the machine and given back. A machine that was paused through
// libvirt is left alone. While the daemon itself is frozen nothing can be resumed;
// the guardian goes on trying.
//
// # Concurrency and failure modes
//
// The child is one loop over poll; only the take-over waits for the fault server
// in a second goroutine, joined before the report. If the guardian is killed,
// [Guardian.Done] is closed; if it is stopped, [Guardian.Check] says so by the age
// of its beat: the agent must then abort the checkpoint. [Guardian.Stop] ends it
// in order and reaps it; no zombie and no cgroup is left.
package guardian

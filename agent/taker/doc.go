// Package taker has each checkpoint of a daemon taken by a process of its own.
//
// # Why a process
//
// A guardian cannot tell an agent that is late from one that is frozen, and ends it. If the
// daemon took its checkpoints itself, one beat that comes late, or one crash in one capture,
// would end the protection of every VM of the host. So the daemon never holds a VM: the
// process that does, the taker, is started for one checkpoint, is the one that the guardian
// watches and ends, and is for the daemon a checkpoint that failed.
//
// # Life cycle
//
// Start starts the child, gives it its order and returns when it has looked at the VM and
// would begin; Take has it begin and returns what came of it; Close ends it and waits until
// nothing of it is left: the guardian and the fault server write to the same pipe, whose end
// is theirs as well. A taker takes one checkpoint.
//
// The child inherits the VM's lock, so that nobody else works on the VM as long as it or
// its guardian lives, whatever has become of the daemon.
//
// # The line
//
// Both speak lines of JSON over a socket pair, the child's descriptor 3. Down come the order,
// the word to begin, and room in the host's bandwidth for bytes that were asked for; up go
// steps, events of the VM's monitor, bytes on their way to the store, a beat every second,
// and in the end a result or an error. What the guest waits behind is never asked for but
// only told, and nobody waits until the daemon has read it.
//
// The end of what comes down is the order to give up. It comes by Take's context, and
// with the daemon's death: the child then leaves its checkpoint the way any cancelled
// one is left.
//
// # Failure modes
//
// A child that ends without a result, or of which nothing is heard for [silence], is killed
// and an error that says what it and its guardian said last. While it holds the VM its
// guardian is far quicker. A daemon that is frozen keeps nobody: the child finishes and waits
// with its result.
//
// # Concurrency
//
// A Taker belongs to one goroutine. It starts one that reads what is said on standard error
// and one for each grant of bandwidth that is waited for; Close joins them. In the child
// Main owns the two that speak and listen.
package taker

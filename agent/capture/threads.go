package capture

import (
	"runtime"

	"github.com/ckagent/ckagent/agent/procstat"
)

const (
	// mostScans and the rings of two fault threads are as many as an image has lanes: no
	// ring waits for another's write.
	mostScans = 6
	// fewestDirect and mostDirect bound the threads of a stopped VM. Its guest needs no
	// processor, and waits for the end.
	fewestDirect = 2
	mostDirect   = 8
)

// spareProcessors are the host's processors that have nothing to do now, and how many we
// may use. Where nothing can be learned the host is taken for busy.
func spareProcessors() (allowed, idle int) {
	idle, err := procstat.IdleProcessors()
	if err != nil {
		idle = 0
	}
	return runtime.NumCPU(), idle
}

// scanThreads is how many threads copy RAM beside the running guest, each with one of
// ours behind it that hashes, compresses and writes. As many as find an idle processor: a
// compressor keeps one busy and leaves the one who copies for it little to do, while a
// thread that only hashes and writes takes no longer than the copying. One processor is
// left to the guest. One thread there always is, or the memory would never be let go.
func scanThreads(allowed, idle int, compress bool) int {
	n := idle
	if !compress {
		n = idle / 2
	}
	return max(1, min(n, allowed-1, mostScans))
}

// directThreads is how many threads read, hash, compress and write the RAM of a stopped VM.
func directThreads(allowed, idle int) int {
	return max(fewestDirect, min(idle, allowed, mostDirect))
}

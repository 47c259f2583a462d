package guardian

import (
	"sync/atomic"
	"unsafe"
)

// words is the layout of the control page. Each word has one writer, given in
// brackets. Times are CLOCK_MONOTONIC nanoseconds, see Now.
type words struct {
	magic   atomic.Uint64
	version atomic.Uint64

	AgentBeatNS    atomic.Int64 // [agent] at least every BeatEvery while Engaged
	ServerBeatNS   atomic.Int64 // [fault server] 0 until its first; not watched before
	GuardianBeatNS atomic.Int64 // [guardian] every 20 ms

	Engaged       atomic.Uint32 // [agent] 1: beats are watched, death is acted on
	Running       atomic.Uint32 // [agent] 1: the VM was running before we stopped it
	Stopped       atomic.Uint32 // [agent] 1: from before `stop` is sent until `cont` is acknowledged
	SigStopped    atomic.Uint32 // [agent] 1: from before SIGSTOP is sent until after SIGCONT
	Phase         atomic.Uint32 // [agent] what it is at, for reports
	QuitRequested atomic.Uint32 // [agent] 1: Stop was called
	GuardianActed atomic.Uint32 // [guardian] an Acted
	Injecting     atomic.Uint32 // [fault server] not 0: it may leave descriptors in QEMU if it dies now; the thread it borrows, 1 before there is one
}

// wordsOf lays the words over a mapped page; mmap memory is page-aligned, which
// 64-bit atomics need.
func wordsOf(mem []byte) *words {
	_ = mem[unsafe.Sizeof(words{})-1]
	return (*words)(unsafe.Pointer(unsafe.SliceData(mem)))
}

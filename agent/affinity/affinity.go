package affinity

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/procstat"
)

const (
	// every is how long a look at the vCPUs holds: some microseconds a vCPU, against
	// the slice of several milliseconds that a vCPU would be without its processor.
	every = 4 * time.Millisecond
	// most bounds what a look costs. A VM with more vCPUs runs on a host with enough
	// processors for the scheduler to find an idle one by itself.
	most = 32
)

// VCPUs are the threads to stay away from.
type VCPUs struct {
	tids []int
}

// Of names the vCPUs by their thread ids.
func Of(tids []int) VCPUs {
	if len(tids) > most {
		return VCPUs{}
	}
	return VCPUs{tids}
}

// Thread is one background thread. It belongs to it.
type Thread struct {
	vcpus   VCPUs
	allowed unix.CPUSet // before anything was done to it
	known   bool        // allowed is
	now     unix.CPUSet
	next    time.Time
}

// Thread makes the state of the calling thread, which is locked to its goroutine.
func (v VCPUs) Thread() *Thread {
	t := &Thread{vcpus: v}
	if len(v.tids) == 0 {
		return t
	}
	t.known = unix.SchedGetaffinity(0, &t.allowed) == nil && t.allowed.Count() > 1
	t.now = t.allowed
	return t
}

// Keep moves the thread away if a vCPU runs where it may run. It costs next to nothing
// between two looks.
func (t *Thread) Keep() {
	if !t.known {
		return
	}
	now := time.Now()
	if now.Before(t.next) {
		return
	}
	t.next = now.Add(every)
	want := t.free()
	if want == t.now {
		return
	}
	if unix.SchedSetaffinity(0, &want) == nil {
		t.now = want
	}
}

// free is where no vCPU runs; everything allowed if that is nowhere.
func (t *Thread) free() unix.CPUSet {
	free := t.allowed
	for _, tid := range t.vcpus.tids {
		s, err := procstat.Read(tid)
		if err == nil && s.State == 'R' {
			free.Clear(s.Processor)
		}
	}
	if free.Count() == 0 {
		return t.allowed
	}
	return free
}

package cow

import (
	"sync/atomic"
	"unsafe"
)

// stateBytes is the size of what the programs and we share.
const stateBytes = uint64(unsafe.Sizeof(objectsState{}))

func stateOf(raw []byte) *objectsState { return (*objectsState)(unsafe.Pointer(&raw[0])) }

// prepareArgs are for the program prepare; what the page begins with is still to be said.
func prepareArgs(userfaultfd int, page []byte) objectsPrepareArgs {
	return objectsPrepareArgs{Fd: uint32(userfaultfd), Page: uint64(uintptr(unsafe.Pointer(&page[0])))}
}

// SetMode says what the programs do from now on, and which epoch the records to come
// belong to. A program that is at work finishes what it has begun.
func (p *Programs) SetMode(m Mode, epoch uint64) {
	atomic.StoreUint64(&p.state.Epoch, epoch)
	atomic.StoreUint32(&p.state.Mode, uint32(m))
}

// StopAbove has a writer stopped by SIGSTOP as soon as so many bytes wait in the ring;
// 0: never. Whoever asks for it ends that by Stopped and SIGCONT, also when the process
// that called this has died.
func (p *Programs) StopAbove(bytes uint64) { atomic.StoreUint64(&p.state.StopBytes, bytes) }

// Stopped reports whether the process was stopped.
func (p *Programs) Stopped() bool { return atomic.LoadUint32(&p.state.Stopped) != 0 }

// Continuing is called right before SIGCONT is sent: it may be stopped again.
func (p *Programs) Continuing() { atomic.StoreUint32(&p.state.Stopped, 0) }

// DropRecord loses the n-th record from now on, for tests of who looks after that.
func (p *Programs) DropRecord(n uint64) { atomic.StoreUint64(&p.state.Drop, n) }

// Losses counts events since Load.
type Losses struct {
	// Pages that were about to be written and were not copied.
	Full       uint64 // no room in the ring
	Unreadable uint64 // the page could not be read
	Changing   uint64 // its entry changed at each of several looks
	OddIO      uint64 // direct I/O described in a way the program does not know
	Dropped    uint64 // by DropRecord
	// Nothing is lost by these.
	Absent   uint64 // not mapped at that moment, and not known to be zeros
	Unmarked uint64 // somebody else's write came first
	Twice    uint64 // somebody else copied it at the same time
	Stops    uint64 // times the process was stopped
}

// Lost is how many pages were not copied though they should have been.
func (l *Losses) Lost() uint64 { return l.Full + l.Unreadable + l.Changing + l.OddIO + l.Dropped }

// Losses reads the counters.
func (p *Programs) Losses() Losses {
	s := p.state
	return Losses{
		Full: atomic.LoadUint64(&s.Full), Unreadable: atomic.LoadUint64(&s.Unreadable),
		Changing: atomic.LoadUint64(&s.Changing), OddIO: atomic.LoadUint64(&s.OddIo),
		Dropped: atomic.LoadUint64(&s.Dropped), Absent: atomic.LoadUint64(&s.Absent),
		Unmarked: atomic.LoadUint64(&s.Unmarked), Twice: atomic.LoadUint64(&s.Twice),
		Stops: atomic.LoadUint64(&s.Stops),
	}
}

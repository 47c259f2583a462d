package pager

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Phase is how far a pager has come. It only grows, except that damaged goes back
// to serving when a page could be had after all.
type Phase uint32

const (
	PhaseCold       Phase = iota
	PhaseConfigured       // the configuration is in the run directory
	PhaseServing          // armed; faults are served, the drain is under way
	PhaseDamaged          // everything is in but pages that cannot be had
	PhaseReleasing        // everything is in; nothing of the source is needed any more
	PhaseDone             // unregistered and closed
	PhaseFailed           // Start failed; nothing of it remains
	PhaseGone             // the process ended first
)

var phaseNames = [...]string{"cold", "configured", "serving", "damaged", "releasing", "done", "failed", "gone"}

func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase %d", uint32(p))
}

// over reports that neither process has anything left to do.
func (p Phase) over() bool { return p >= PhaseDone }

// seat is who does one of the two jobs, and the last sign of life.
type seat struct {
	who    atomic.Uint64 // occupant, packed: pid and start change as one
	beatNS atomic.Int64  // CLOCK_MONOTONIC
	spawns atomic.Uint64 // how often the seat was filled
	works  atomic.Uint64 // how often its occupant got to work
}

const (
	controlMagic   = 0x636b7067_00000001
	controlBytes   = 16384
	histSub        = 8 // buckets per power of two
	histBuckets    = 64 * histSub
	flagDetached   = 1 << 0 // the last one out removes the run directory's files
	flagRelease    = 1 << 1 // drain now although NoDrain
	flagRetry      = 1 << 2 // try bad pages again
	controlMapping = "ckagent-pager"
)

// controlBlock is memory shared by everybody who has to do with one pager: atomics
// only, sized and sealed at creation. Counters live here so that they survive a
// worker. All times are CLOCK_MONOTONIC, which all processes of a host share.
type controlBlock struct {
	magic      uint64
	phase      atomic.Uint32 // Phase; a futex
	flags      atomic.Uint32
	worker     seat
	supervisor seat

	startNS    atomic.Int64 // configured
	armedNS    atomic.Int64
	drainedNS  atomic.Int64
	doneNS     atomic.Int64
	collapseNS atomic.Int64

	faults      atomic.Uint64 // messages served
	zeroFaults  atomic.Uint64 // of them, of zero pages
	late        atomic.Uint64 // of them, for pages that were there by then
	aheadPages  atomic.Uint64 // read ahead by fault threads
	nearPages   atomic.Uint64 // by the drain, because of a fault
	hotPages    atomic.Uint64
	drainBytes  atomic.Uint64 // by the drain, in all
	leftPages   atomic.Int64  // still to come
	badPages    atomic.Int64  // cannot be had
	readErrors  atomic.Uint64
	wokenRanges atomic.Uint64
	collapsed   atomic.Uint64 // bytes made huge again
	rssBytes    atomic.Uint64 // largest seen of the worker

	hist [histBuckets]atomic.Uint64 // fault service times
}

type control struct {
	*controlBlock
	mem  []byte
	file *os.File
}

func newControl() (*control, error) {
	fd, err := unix.MemfdCreate(controlMapping, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("control memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), controlMapping)
	if err := f.Truncate(controlBytes); err != nil {
		f.Close()
		return nil, fmt.Errorf("control memory: %w", err)
	}
	// Nobody may shrink what everybody has mapped.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal control memory: %w", err)
	}
	c, err := mapControl(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	c.magic = controlMagic
	return c, nil
}

// openControl maps what newControl made elsewhere; f becomes its own on success.
func openControl(f *os.File) (*control, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("control memory: %w", err)
	}
	if st.Size() != controlBytes {
		return nil, fmt.Errorf("control memory: %d bytes, %d expected", st.Size(), controlBytes)
	}
	c, err := mapControl(f)
	if err != nil {
		return nil, err
	}
	if c.magic != controlMagic {
		c.file = nil
		c.close()
		return nil, errors.New("control memory: of another version, or not one")
	}
	return c, nil
}

func mapControl(f *os.File) (*control, error) {
	if unsafe.Sizeof(controlBlock{}) > controlBytes {
		return nil, errors.New("control memory: too small")
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, controlBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map control memory: %w", err)
	}
	return &control{controlBlock: (*controlBlock)(unsafe.Pointer(&mem[0])), mem: mem, file: f}, nil
}

func (c *control) close() {
	if c.mem != nil {
		_ = unix.Munmap(c.mem)
		c.mem, c.controlBlock = nil, nil
	}
	if c.file != nil {
		c.file.Close()
		c.file = nil
	}
}

func (c *control) phaseNow() Phase { return Phase(c.phase.Load()) }

// advance publishes a phase, unless somebody got further already, and wakes who
// waits for one. It reports whether p is the phase now.
func (c *control) advance(p Phase) bool {
	for {
		old := c.phaseNow()
		if old >= p {
			return old == p
		}
		if c.phase.CompareAndSwap(uint32(old), uint32(p)) {
			c.wake()
			return true
		}
	}
}

// undamage goes back from damaged to serving.
func (c *control) undamage() {
	if c.phase.CompareAndSwap(uint32(PhaseDamaged), uint32(PhaseServing)) {
		c.wake()
	}
}

func (c *control) wake() {
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&c.phase)), 1 /* FUTEX_WAKE */, 1<<30, 0, 0, 0)
}

// waitPhase returns when the phase is no longer p, or after d.
func (c *control) waitPhase(p Phase, d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&c.phase)), 0, /* FUTEX_WAIT */
		uintptr(p), uintptr(unsafe.Pointer(&ts)), 0, 0)
}

func (c *control) setFlag(f uint32) { c.flags.Or(f); c.wake() }

func (c *control) has(f uint32) bool { return c.flags.Load()&f != 0 }

// record adds a service time to the histogram.
func (c *control) record(ns int64) { c.hist[histBucket(ns)].Add(1) }

func histBucket(ns int64) int {
	v := uint64(max(ns, 1))
	e := bits.Len64(v) - 1
	sub := uint64(0)
	if e >= 3 {
		sub = v >> (e - 3) & 7
	}
	return e*histSub + int(sub)
}

// histValue is the middle of a bucket in ns.
func histValue(b int) int64 {
	e, sub := b/histSub, uint64(b%histSub)
	if e < 3 {
		return 1 << e
	}
	return int64(1)<<e + int64(sub)<<(e-3) + int64(1)<<(e-3)/2
}

// quantiles returns the service times below which so much (0 to 1) of all lie.
func (c *control) quantiles(qs ...float64) []int64 {
	var counts [histBuckets]uint64
	var sum uint64
	for i := range counts {
		counts[i] = c.hist[i].Load()
		sum += counts[i]
	}
	out := make([]int64, len(qs))
	for k, q := range qs {
		var seen uint64
		for i, n := range counts {
			seen += n
			if n != 0 && float64(seen) >= q*float64(sum) {
				out[k] = histValue(i)
				break
			}
		}
	}
	return out
}

// Two readings of the same clock: one that other processes understand, one that
// costs no system call.
var (
	clockBase = time.Now()
	clockNS   = func() int64 {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			return 0
		}
		return ts.Nano()
	}()
)

// nowNS is CLOCK_MONOTONIC.
func nowNS() int64 { return clockNS + int64(time.Since(clockBase)) }

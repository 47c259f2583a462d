package pager

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd"
)

// The target: a process with some memory and a userfaultfd of its own, whose
// threads touch random pages, check what they see, and write to some of them.

type targetSpec struct {
	Blocks  []testBlock
	Threads int
	Seed    uint64
	Quiet   bool // it is going to die loudly
}

type targetHello struct {
	FD  int
	HVA []uint64
}

type targetReport struct {
	Touches uint64 // pages touched and found right
	Bad     uint64 // pages found wrong
	First   string // what was wrong with the first
	P50NS   int64  // of touches that look like faults, as the thread saw them
	P99NS   int64
	Busy    int // threads in the middle of a touch
}

type targetThread struct {
	touches atomic.Uint64
	busy    atomic.Bool
	times   []int64
	sink    byte // keeps the reads
}

type targetState struct {
	spec    targetSpec
	mem     [][]byte
	owner   [][]atomic.Uint32 // per page: how often a thread wrote to it
	threads []*targetThread
	stop    atomic.Bool
	bad     atomic.Uint64
	first   atomic.Pointer[string]
	wg      sync.WaitGroup
}

// deepen gives the calling goroutine a stack like a C thread's. Descriptors are
// closed inside by a frame pushed below the stack pointer of some thread, which is
// room that any C program has; a young goroutine has 2 KiB, and next to it lies the
// stack of another.
//
//go:noinline
func deepen() { descend(64) }

//go:noinline
func descend(n int) byte {
	var room [4 << 10]byte // 64 times
	room[n] = byte(n)
	if n == 0 {
		return room[0]
	}
	return descend(n-1) + room[n]
}

func targetMain(arg string) error {
	deepen()
	t := &targetState{}
	if err := json.Unmarshal([]byte(arg), &t.spec); err != nil {
		return err
	}
	runtime.GOMAXPROCS(t.spec.Threads + 4)
	f, err := uffd.New(unix.O_CLOEXEC)
	if err != nil {
		return err
	}
	hello := targetHello{FD: int(f.Fd())}
	for _, b := range t.spec.Blocks {
		fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
		if b.Memfd {
			if fd, err = unix.MemfdCreate("target", unix.MFD_CLOEXEC); err == nil {
				err = unix.Ftruncate(fd, int64(b.Pages*PageBytes))
			}
			if err != nil {
				return err
			}
			flags = unix.MAP_SHARED
		}
		m, err := unix.Mmap(fd, 0, int(b.Pages*PageBytes), unix.PROT_READ|unix.PROT_WRITE, flags)
		if err != nil {
			return err
		}
		if b.Dirty {
			m[PageBytes] = 1
		}
		t.mem = append(t.mem, m)
		t.owner = append(t.owner, make([]atomic.Uint32, b.Pages))
		hello.HVA = append(hello.HVA, uint64(uintptr(unsafe.Pointer(&m[0]))))
	}
	enc := json.NewEncoder(os.Stdout)
	if err := enc.Encode(hello); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch in.Text() {
		case "go":
			t.run()
		case "stop":
			t.stop.Store(true)
			t.wg.Wait()
		case "all": // every page, in order
			t.sweep()
		}
		if err := enc.Encode(t.report()); err != nil {
			return err
		}
	}
	return nil
}

func (t *targetState) report() (r targetReport) {
	var times []int64
	for _, th := range t.threads {
		r.Touches += th.touches.Load()
		if th.busy.Load() {
			r.Busy++
		} else if t.stop.Load() {
			times = append(times, th.times...)
		}
	}
	slices.Sort(times)
	if len(times) > 0 {
		r.P50NS, r.P99NS = times[len(times)/2], times[len(times)*99/100]
	}
	r.Bad = t.bad.Load()
	if s := t.first.Load(); s != nil {
		r.First = *s
	}
	return r
}

func (t *targetState) run() {
	t.stop.Store(false)
	for i := range t.spec.Threads {
		th := &targetThread{times: make([]int64, 0, 1<<16)}
		t.threads = append(t.threads, th)
		t.wg.Go(func() {
			runtime.LockOSThread()
			deepen()
			r := rand.New(rand.NewPCG(t.spec.Seed, uint64(i)))
			want := make([]byte, PageBytes)
			for !t.stop.Load() {
				b := r.IntN(len(t.mem))
				page := r.Uint64N(t.spec.Blocks[b].Pages)
				// Each page belongs to one thread, so that contents are known.
				page -= page % uint64(t.spec.Threads)
				page += uint64(i)
				if page < t.spec.Blocks[b].Pages {
					t.touch(th, b, page, r.IntN(4) == 0 && t.spec.Blocks[b].HasCow, want)
				}
			}
		})
	}
}

// touch checks a page against what it must be, and writes to it if asked.
func (t *targetState) touch(th *targetThread, b int, page uint64, write bool, want []byte) {
	m := t.mem[b][page*PageBytes : (page+1)*PageBytes]
	writes := t.owner[b][page].Load()
	pageOf(b, page, want)
	if writes > 0 {
		want[8] = byte(writes)
	}
	th.busy.Store(true)
	t0 := time.Now()
	if write {
		// The store comes first: a write fault.
		t.owner[b][page].Store(writes%200 + 1)
		m[8] = byte(writes%200 + 1)
		want[8] = byte(writes%200 + 1)
	} else {
		th.sink += m[0]
	}
	d := time.Since(t0)
	th.busy.Store(false)
	if d > 2*time.Microsecond && len(th.times) < cap(th.times) {
		th.times = append(th.times, int64(d))
	}
	if string(m) != string(want) {
		t.bad.Add(1)
		s := fmt.Sprintf("block %d page %d: % x..., want % x...", b, page, m[:16], want[:16])
		t.first.CompareAndSwap(nil, &s)
		return
	}
	th.touches.Add(1)
}

func (t *targetState) sweep() {
	th := &targetThread{}
	t.threads = append(t.threads, th)
	want := make([]byte, PageBytes)
	for b := range t.mem {
		for page := range t.spec.Blocks[b].Pages {
			t.touch(th, b, page, false, want)
		}
	}
}

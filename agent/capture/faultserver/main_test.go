package faultserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/uffd"
)

// The test binary plays the fault server when it is started as one. It takes the
// userfaultfd that its parent, the target, made for it.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "faultserver" {
		// The race detector makes a process wait for a second at its end, unless it is told
		// otherwise; what a server inherits is fixed.
		if _, told := os.LookupEnv("GORACE"); !told {
			panic(unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), "GORACE=atexit_sleep_ms=0")))
		}
		if err := Main(Deps{Take: takeFromParent, OpenControl: func(*os.File) (func(), error) { return func() {}, nil }}); err != nil {
			fmt.Fprintln(os.Stderr, "fault server:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// raceExit is how a program ends in which the race detector has found something.
const raceExit = 66

func takeFromParent(pid int, _ []int) (*os.File, error) {
	var fd int
	if _, err := fmt.Sscan(os.Args[2], &fd); err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pidfd)
	local, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(local), "userfaultfd"), nil
}

// target is memory of this process that a fault server captures, and writers
// that change it all the time. Every word of a page holds its sequence number, so
// a torn page shows.
type target struct {
	mem     []byte
	kind    source.Kind
	uffd    *os.File     // until a server has taken it
	gate    sync.RWMutex // held for reading around each write: Lock stops the guest
	stop    atomic.Bool
	writes  atomic.Uint64
	writers sync.WaitGroup
}

func newTarget(t *testing.T, kind source.Kind, pages int, huge bool) *target {
	t.Helper()
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if kind != source.Anonymous {
		var err error
		if fd, err = unix.MemfdCreate("target", unix.MFD_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, int64((pages+hugePages)*pageBytes)); err != nil {
			t.Fatal(err)
		}
		flags = unix.MAP_SHARED
		if kind == source.PrivateFile {
			flags = unix.MAP_PRIVATE
		}
	}
	whole, err := unix.Mmap(fd, 0, (pages+hugePages)*pageBytes, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(whole) })
	skip := -uintptr(unsafe.Pointer(&whole[0])) % (hugePages * pageBytes)
	g := &target{mem: whole[skip:][:pages*pageBytes], kind: kind}
	advice := unix.MADV_NOHUGEPAGE
	if huge {
		advice = unix.MADV_HUGEPAGE
	}
	if err := unix.Madvise(g.mem, advice); err != nil {
		t.Fatal(err)
	}
	for p := range pages {
		if p%8 < 5 || huge { // the rest stays absent
			g.write(p, uint64(p))
		}
	}
	return g
}

func (g *target) address() uint64 { return uint64(uintptr(unsafe.Pointer(&g.mem[0]))) }

func (g *target) write(page int, seq uint64) {
	b := g.mem[page*pageBytes:][:pageBytes]
	for i := 0; i < pageBytes; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], seq)
	}
}

// start runs writers that rewrite random pages.
func (g *target) start(n int) {
	for id := range n {
		g.writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(id), 99))
			for seq := uint64(id) << 32; !g.stop.Load(); seq++ {
				g.gate.RLock()
				g.write(rng.IntN(len(g.mem)/pageBytes), seq)
				g.gate.RUnlock()
				g.writes.Add(1)
			}
		})
	}
}

func (g *target) end() {
	g.stop.Store(true)
	g.writers.Wait()
}

// with sets the engine.
func with(e Engine) func(*Start) {
	return func(o *Start) {
		if o.Config.Engine = e; e == Kernel {
			o.Config.FaultThreads, o.Config.RingBytes, o.FaultRingPages = 1, 32<<20, 4096
		}
	}
}

func startServer(t *testing.T, g *target, change func(*Start)) *Client {
	t.Helper()
	f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	g.uffd = f
	t.Cleanup(func() { f.Close() })
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fd uintptr
	if err := conn.Control(func(p uintptr) { fd = p }); err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o := Start{Self: self, Args: []string{"faultserver", fmt.Sprint(fd)}, Control: null,
		FaultRingPages: 2048, ScanRingPages: 4096,
		Config: Config{QEMUPID: os.Getpid(), FaultThreads: 2, ScanThreads: 1, MaxStall: 5 * time.Second,
			FaultAround: 16, HugeAround: true, Collapse: time.Second,
			Blocks: []source.Block{{HVA: g.address(), Pages: uint64(len(g.mem) / pageBytes), Kind: g.kind}}}}
	if change != nil {
		change(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if state := c.proc.cmd.ProcessState; state != nil && state.ExitCode() == raceExit {
			t.Error("the race detector has found something in the server")
		}
	})
	if err := c.Ready(t.Context()); err != nil {
		t.Fatal(errors.Join(err, c.Close()))
	}
	return c
}

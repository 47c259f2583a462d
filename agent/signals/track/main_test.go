package track

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/bpf/dirty"
	"github.com/ckagent/ckagent/uffd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The tests track memory of this process: the kernel resolves the faults, so that
// nobody can wait for himself.

func takeOwn(context.Context, int, []int) (*os.File, error) {
	return uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
}

// memory is guest memory of which we are the guest.
type memory struct {
	t     testing.TB
	b     []byte
	block vm.RAMBlock
}

func newMemory(t testing.TB, name string, pages int) *memory {
	t.Helper()
	b, err := unix.Mmap(-1, 0, pages*pageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	if err := unix.Madvise(b, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	m := &memory{t: t, b: b}
	m.block = vm.RAMBlock{Name: name, HVA: uint64(uintptr(unsafe.Pointer(&b[0]))), UsedBytes: uint64(len(b)), TotalBytes: uint64(len(b)), Main: true}
	return m
}

func (m *memory) write(page int) { m.b[page*pageBytes+int(rand.Uint32N(4096))]++ }

func open(t testing.TB, c *dirty.Counter, blocks ...vm.RAMBlock) *Tracker {
	t.Helper()
	tr, err := Open(t.Context(), Config{PID: os.Getpid(), Blocks: blocks, Take: takeOwn, Counter: c, CollapseBudget: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

func counter(t testing.TB) *dirty.Counter {
	t.Helper()
	c, err := dirty.Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func collect(t testing.TB, take func(func(first, count uint64)) error) (pages []int) {
	t.Helper()
	if err := take(func(first, count uint64) {
		for ; count > 0; first, count = first+1, count-1 {
			pages = append(pages, int(first))
		}
	}); err != nil {
		t.Fatal(err)
	}
	return pages
}

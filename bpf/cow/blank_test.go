package cow

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// records reads the ring: what each page held, and which of them without data.
func (b *bed) records() (held map[uint64][]byte, untouched map[uint64]bool) {
	held, untouched = map[uint64][]byte{}, map[uint64]bool{}
	for {
		r, ok := b.p.Next()
		if !ok {
			return held, untouched
		}
		held[r.Page] = bytes.Clone(content(r))
		if r.Data == nil {
			untouched[r.Page] = true
		}
		b.p.Advance()
	}
}

// page is the memory of pages.
func (b *bed) page(first, n int) []byte { return b.mem[first*PageBytes:][:n*PageBytes] }

// TestUntouchedPages: a page that nobody had touched has its record as soon as it is
// written, whoever writes; one that was read before has a copy of the zeros that the
// reader was given.
func TestUntouchedPages(t *testing.T) {
	b := newBed(t, memory{}, 256, 1<<20)
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, bytes.Repeat([]byte{7}, 64*PageBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	want := b.arm()
	write := map[string]func(page int){
		"store":       func(page int) { b.fill(page, 1) },
		"system call": func(page int) { readInto(t, file, 0, b.page(page, 1)) },
		"direct I/O":  func(page int) { readInto(t, file, unix.O_DIRECT, b.page(page, 1)) },
	}
	page := 0
	for name, do := range write {
		do(page)
		if bytes.IndexByte(b.page(page+1, 1), 1) >= 0 { // a read
			t.Error("an untouched page is not zeros")
		}
		do(page + 1)
		held, untouched := b.records()
		if len(held) != 2 || len(untouched) != 1 || !untouched[uint64(page)] {
			t.Errorf("%s: records of %d pages, of these untouched %v, of pages %d and after", name, len(held), untouched, page)
		}
		for p, data := range held {
			if !bytes.Equal(data, want[:PageBytes]) {
				t.Errorf("%s: page %d: % x...", name, p, data[:16])
			}
		}
		page += 2
	}
	if l := b.p.Losses(); l.Lost() != 0 || l.Absent != 0 {
		t.Errorf("losses %+v", l)
	}
}

func readInto(t *testing.T, file string, flags int, dst []byte) {
	t.Helper()
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if n, err := unix.Pread(fd, dst, 0); err != nil || n != len(dst) {
		t.Fatal(n, err)
	}
}

// TestDiscardedIsNotUntouched: that nothing is mapped is no proof of zeros. A discard
// takes the mark of anonymous memory along; where it stays, in a file's memory, the page
// may be in the file still, and the caller does not call it blank.
func TestDiscardedIsNotUntouched(t *testing.T) {
	for _, m := range []memory{{name: "anonymous"}, {name: "huge", huge: true}, {name: "memfd", shared: true}} {
		t.Run(m.name, func(t *testing.T) {
			const pages = 1024
			b := newBed(t, m, pages, 8<<20)
			b.race(1, 1)
			want := b.arm()
			if m.shared {
				b.p.Blank().Clear()
			}
			if err := unix.Madvise(b.page(0, pages/2), unix.MADV_DONTNEED); err != nil {
				t.Fatal(err)
			}
			b.race(3, 2)
			held, untouched := b.records()
			if len(untouched) > 0 {
				t.Errorf("%d discarded pages were taken for untouched", len(untouched))
			}
			for p, data := range held {
				if !bytes.Equal(data, want[p*PageBytes:][:PageBytes]) {
					t.Fatalf("page %d: % x..., was % x...", p, data[:16], want[p*PageBytes:][:16])
				}
			}
			if !m.shared && len(held) != pages/2 {
				t.Errorf("%d records, %d pages were not discarded", len(held), pages/2)
			}
			if l := b.p.Losses(); l.Absent == 0 {
				t.Errorf("losses %+v: no page was found absent", l)
			}
		})
	}
}

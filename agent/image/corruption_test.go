package image

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"path/filepath"
	"testing"

	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
	"github.com/ckagent/ckagent/agent/problem"
)

// smallImage is an image in memory with every kind of entry, small enough to be
// damaged thousands of times.
func smallImage(t testing.TB, codec string) (f *memfs.FS, m *Manifest, ram []byte, state []byte) {
	t.Helper()
	f = memfs.New(1 << 30)
	ram = fillPages(3, 40*4096)
	state = fillPages(4, 3*4096)
	blocks := []Block{{Name: "pc.ram", UsedBytes: uint64(len(ram)), TotalBytes: uint64(len(ram)), PageBytes: 4096, Backing: "anonymous", Main: true}}
	w, err := NewWriter("/", blocks, WriterOptions{FS: f, Compress: codec, Lanes: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WritePages(0, 0, ram[:24*4096]); err != nil {
		t.Fatal(err)
	}
	if err := w.WritePages(0, 24, ram[24*4096:]); err != nil {
		t.Fatal(err)
	}
	if err := w.WriteDeviceState(bytes.NewReader(state)); err != nil {
		t.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	m = testManifest(s)
	m.Hot = nil
	putManifest(t, f, m)
	return f, m, ram, state
}

func putManifest(t testing.TB, f *memfs.FS, m *Manifest) {
	t.Helper()
	data, err := EncodeManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := f.Create("/" + ManifestName); err == nil {
		c.Close()
	}
	if err := f.Update("/"+ManifestName, func([]byte) []byte { return data }); err != nil {
		t.Fatal(err)
	}
}

// readAll reads everything and compares what came without an error; it returns
// the errors.
func readAll(t testing.TB, f *memfs.FS, ram, state []byte) (errs []error) {
	t.Helper()
	r, err := OpenReaderFS(f, "/")
	if err != nil {
		return []error{err}
	}
	defer r.Close()
	page := make([]byte, 4096)
	for p := range uint64(len(ram) / 4096) {
		if _, err := r.ReadPage(0, p, page); err != nil {
			errs = append(errs, err)
		} else if !bytes.Equal(page, ram[p*4096:(p+1)*4096]) {
			t.Fatalf("page %d: wrong bytes and no error", p)
		}
	}
	got, err := r.DeviceState(context.Background())
	if err != nil {
		errs = append(errs, err)
	} else if !bytes.Equal(got, state) {
		t.Fatal("device state: wrong bytes and no error")
	}
	if err := r.Verify(context.Background(), nil); err != nil {
		errs = append(errs, err)
	} else if len(errs) > 0 {
		t.Fatalf("verifies, and yet %v", errs[0])
	}
	return errs
}

func TestDamage(t *testing.T) {
	for _, codec := range []string{"none", "s2", "zstd"} {
		f, m, ram, state := smallImage(t, codec)
		if errs := readAll(t, f, ram, state); len(errs) > 0 {
			t.Fatal(errs)
		}
		names := []string{ManifestName, m.Pagemap.Name, m.DeviceState.Name}
		for _, s := range m.Segments {
			names = append(names, s.Name)
		}
		for _, name := range names {
			t.Run(codec+"/"+name, func(t *testing.T) {
				var whole []byte
				f.Update("/"+name, func(b []byte) []byte { whole = b; return b })
				rnd := rand.New(rand.NewSource(1))
				expect := func(what string, changed []byte) {
					t.Helper()
					if bytes.Equal(changed, whole) {
						return
					}
					f.Update("/"+name, func([]byte) []byte { return changed })
					errs := readAll(t, f, ram, state)
					if len(errs) == 0 {
						t.Errorf("%s: not noticed", what)
					}
					for _, err := range errs {
						if !problem.Is(err, problem.Integrity) {
							t.Errorf("%s: %v (%s)", what, err, problem.CodeOf(err))
						}
					}
				}
				// The first 120 bytes and the last 60 closely, and some between.
				stride, rounds, dense := 211, 30, 1
				if testing.Short() {
					stride, rounds, dense = 2003, 6, 4
				}
				for off := range whole {
					if edge := off < 120 || off >= len(whole)-60; edge && off%dense != 0 || !edge && off%stride != 0 {
						continue
					}
					c := bytes.Clone(whole)
					c[off] ^= 1 << rnd.Intn(8)
					expect(fmt.Sprintf("bit flipped at %d", off), c)
				}
				for range rounds {
					n := rnd.Intn(len(whole))
					expect(fmt.Sprintf("cut off at %d", n), bytes.Clone(whole[:n]))
					c := bytes.Clone(whole)
					clear(c[n:min(n+512, len(c))])
					expect(fmt.Sprintf("zeros at %d", n), c)
					c = bytes.Clone(whole)
					from := rnd.Intn(len(whole))
					copy(c[n:], whole[from:min(from+512, len(whole))])
					expect(fmt.Sprintf("content of %d at %d", from, n), c)
				}
				expect("something appended", append(bytes.Clone(whole), 0))
				expect("emptied", []byte{})
				f.Update("/"+name, func([]byte) []byte { return whole })
			})
		}
		t.Run(codec+"/missing", func(t *testing.T) {
			for _, name := range names[1:] {
				var whole []byte
				f.Update("/"+name, func(b []byte) []byte { whole = b; return b })
				if err := f.Remove("/" + name); err != nil {
					t.Fatal(err)
				}
				errs := readAll(t, f, ram, state)
				if len(errs) == 0 || !problem.Is(errs[0], problem.Integrity) {
					t.Errorf("without %s: %v", name, errs)
				}
				w, err := f.Create("/" + name)
				if err != nil {
					t.Fatal(err)
				}
				if err := w.WriteVec([][]byte{whole}, 0); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestTruncatedWhileOpen cuts a file off after it was opened: with a mapping this
// would kill the process.
func TestTruncatedWhileOpen(t *testing.T) {
	f, m, ram, _ := smallImage(t, "none")
	r, err := OpenReaderFS(f, "/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, name := range []string{m.Segments[0].Name, m.Pagemap.Name} {
		if err := f.Update(filepath.Join("/", name), func(b []byte) []byte { return b[:100] }); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadRun(0, 0, make([]byte, len(ram))); !problem.Is(err, problem.Integrity) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

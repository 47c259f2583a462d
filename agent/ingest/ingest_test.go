package ingest

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/ramstream"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const machine = "pc-i440fx-7.2"

func page(seed byte) []byte { return bytes.Repeat([]byte{seed, 7}, ramstream.PageBytes/2) }

// stream is a small machine's, with a page that was sent twice, one that became
// zero, one that was never sent.
func stream(t testing.TB) []byte {
	t.Helper()
	state, err := os.ReadFile("../vm/vmstate/testdata/" + machine + ".state")
	if err != nil {
		t.Fatal(err)
	}
	head, tail, err := vmstate.Split(machine, state)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	e := ramstream.NewEncoder(&out, 99, true)
	const p = ramstream.PageBytes
	err = errors.Join(
		e.Begin(head, []ramstream.Block{{Name: "pc.ram", UsedBytes: 6 * p}, {Name: "pc.bios", UsedBytes: p}}),
		e.Page(0, 0, page(1)), e.Page(0, p, page(2)), e.Page(0, 2*p, page(3)),
		e.Zero(0, 3*p), e.Page(0, 4*p, page(4)), e.Page(1, 0, page(5)),
		e.Page(0, p, page(6)), e.Zero(0, 4*p), e.Page(0, 3*p, page(7)),
		e.End(tail))
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func options(t testing.TB, argv ...string) Options {
	t.Helper()
	c, err := vm.ReadCommandLine(append([]string{"qemu-system-x86_64", "-m", "1"}, argv...))
	if err != nil {
		t.Fatal(err)
	}
	return Options{Command: c, Binary: "/usr/bin/qemu-system-x86_64", At: time.Now(), Cwd: "/"}
}

func newStore(t testing.TB) *store.Store {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestImport(t *testing.T) {
	st := newStore(t)
	o := options(t, "-name", "web", "-object", "secret,id=s0,data=hush", "-incoming", "defer", "-accel", "kvm:tcg")
	res, err := Import(t.Context(), bytes.NewReader(stream(t)), st, o)
	if err != nil {
		t.Fatal(err)
	}
	m := res.Manifest
	if m.VM != "web" || m.Machine.Type != machine || m.Machine.Accel != "kvm" || m.Machine.VCPUs != 1 || m.Mode != Mode ||
		res.ResentPages != 3 || res.UnsentPages != 1 || len(res.Notes) != 0 || m.Machine.Facts[image.FactGuestRuns] != "true" {
		t.Errorf("%+v of %+v", res, m)
	}
	if len(m.Machine.Redacted) != 1 || bytes.Contains([]byte(m.Machine.Argv[len(m.Machine.Argv)-1]), []byte("hush")) {
		t.Errorf("%q: %q", m.Machine.Redacted, m.Machine.Argv)
	}
	for _, a := range m.Machine.Argv {
		if a == "-incoming" || bytes.Contains([]byte(a), []byte("hush")) {
			t.Errorf("recorded: %q", m.Machine.Argv)
		}
	}
	img, err := st.OpenImage(t.Context(), m.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, 6*ramstream.PageBytes)
	if _, err := img.ReadRun(0, 0, got); err != nil {
		t.Fatal(err)
	}
	none := make([]byte, ramstream.PageBytes)
	if want := bytes.Join([][]byte{page(1), page(6), page(3), page(7), none, none}, nil); !bytes.Equal(got, want) {
		t.Error("RAM differs")
	}
	state, err := os.ReadFile("../vm/vmstate/testdata/" + machine + ".state")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := img.DeviceState(t.Context()); err != nil || !bytes.Equal(got, state) {
		t.Errorf("the device state differs: %v", err)
	}
	if left, _ := filepath.Glob(img.Dir() + "/spool*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// saved is a libvirt save image around what follows its head.
func saved(format uint32, running bool, order binary.ByteOrder, rest []byte) []byte {
	const text = "<domain/>"
	b := make([]byte, saveHeadBytes+len(text)+20)
	copy(b, saveMagic)
	state := uint32(0)
	if running {
		state = 1
	}
	for i, v := range []uint32{saveVersion, uint32(len(b) - saveHeadBytes), state, format, uint32(len(text) + 1)} {
		order.PutUint32(b[len(saveMagic)+4*i:], v)
	}
	copy(b[saveHeadBytes:], text)
	copy(b[saveHeadBytes+len(text)+1:], "<cookie/>")
	return append(b, rest...)
}

func TestSaveImage(t *testing.T) {
	raw := stream(t)
	var zipped, packed bytes.Buffer
	z := gzip.NewWriter(&zipped)
	if _, err := z.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := zstd.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	st := newStore(t)
	for name, b := range map[string][]byte{
		"raw":        saved(saveRaw, false, binary.LittleEndian, raw),
		"big endian": saved(saveRaw, false, binary.BigEndian, raw),
		"gzip":       saved(saveGzip, false, binary.LittleEndian, zipped.Bytes()),
		"zstd":       saved(saveZstd, false, binary.LittleEndian, packed.Bytes()),
	} {
		o := options(t)
		o.Name = name
		res, err := Import(t.Context(), bytes.NewReader(b), st, o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		m := res.Manifest
		// The head knows that the guest was paused; the stream always says running.
		if m.Machine.LibvirtXML != "<domain/>" || m.Machine.Facts[image.FactGuestRuns] != "false" || len(res.Notes) != 1 ||
			m.Machine.Facts[image.FactManager] != "libvirt" {
			t.Errorf("%s: %+v %+v", name, res, m.Machine)
		}
	}
	part := saved(saveRaw, true, binary.LittleEndian, raw)
	copy(part, savePartial)
	huge := saved(saveRaw, true, binary.LittleEndian, raw)
	binary.LittleEndian.PutUint32(huge[len(saveMagic)+4:], 1<<31)
	for name, c := range map[string]struct {
		in   []byte
		code problem.Code
	}{
		"xz":           {saved(3, true, binary.LittleEndian, raw), problem.Refused},
		"sparse":       {saved(6, true, binary.LittleEndian, raw), problem.Refused},
		"unknown":      {saved(77, true, binary.LittleEndian, raw), problem.Refused},
		"not finished": {part, problem.Integrity},
		"huge XML":     {huge, problem.Integrity},
		"head alone":   {part[:30], problem.Integrity},
		"cut":          {saved(saveRaw, true, binary.LittleEndian, raw)[:200], problem.Integrity},
		"not gzip":     {saved(saveGzip, true, binary.LittleEndian, raw), problem.Integrity},
		"gzip cut":     {saved(saveGzip, true, binary.LittleEndian, zipped.Bytes()[:zipped.Len()/2]), problem.Integrity},
		"zstd spoiled": {saved(saveZstd, true, binary.LittleEndian, append([]byte{1, 2, 3, 4}, packed.Bytes()...)), problem.Integrity},
	} {
		o := options(t)
		o.Name = "bad"
		if _, err := Import(t.Context(), bytes.NewReader(c.in), st, o); !problem.Is(err, c.code) {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	wantNone(t, st, "bad")
}

// wantNone fails if anything of a VM is in the store.
func wantNone(t *testing.T, st *store.Store, vm string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(st.Dir(), "vms", vm, "*")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestRefusals(t *testing.T) {
	st := newStore(t)
	raw := stream(t)
	if _, err := Import(t.Context(), bytes.NewReader(raw), st, options(t)); !problem.Is(err, problem.Usage) {
		t.Errorf("without a name: %v", err)
	}
	o := options(t)
	o.Name = "bad"
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Import(ctx, bytes.NewReader(raw), st, o); !problem.Is(err, problem.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
	other := bytes.ReplaceAll(raw, []byte("\x06pc.ram"), []byte("\x06xx.ram"))
	if _, err := Import(t.Context(), bytes.NewReader(other), st, o); !problem.Is(err, problem.Refused) {
		t.Errorf("another machine's RAM: %v", err)
	}
	if _, err := Import(t.Context(), io.MultiReader(bytes.NewReader(raw[:999]), broken{}), st, o); !problem.Is(err, problem.Failed) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a reader that fails: %v", err)
	}
	// 8 TiB of RAM in a few bytes.
	const much = 8 << 40
	b := append([]byte("QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x01m\x01\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04"), binary.BigEndian.AppendUint64(nil, much|4)...)
	b = binary.BigEndian.AppendUint64(append(b, 1, 'a'), much)
	if _, err := Import(t.Context(), bytes.NewReader(b), st, o); !problem.Is(err, problem.Refused) {
		t.Errorf("8 TiB: %v", err)
	}
	wantNone(t, st, "bad")
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, os.ErrDeadlineExceeded }

func FuzzSaveImage(f *testing.F) {
	f.Add(saved(saveRaw, true, binary.LittleEndian, []byte("QEVM")))
	f.Add(saved(saveGzip, true, binary.BigEndian, []byte("\x1f\x8b\x08")))
	f.Add(saved(saveZstd, false, binary.LittleEndian, []byte("\x28\xb5\x2f\xfd")))
	f.Add([]byte("QEVM"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, s, err := openSaveImage(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, errSaveImage) && !errors.Is(err, ramstream.ErrUnsupported) {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		defer r.Close()
		rest, err := io.ReadAll(io.LimitReader(r, 1<<20))
		if err != nil && !errors.Is(err, errSaveImage) {
			t.Fatalf("error without a kind: %v", err)
		}
		if s == nil && !bytes.Equal(rest, b[:min(len(b), 1<<20)]) {
			t.Fatal("what is no save image was changed")
		}
	})
}

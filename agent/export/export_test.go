package export

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm/ramstream"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	machine  = "pc-i440fx-7.2"
	ramPages = 64
	fourGiB  = 4 << 30
)

// content is RAM with a page of its own number every third page, zeros elsewhere.
func content() []byte {
	b := make([]byte, ramPages*pageBytes)
	for p := 0; p < ramPages; p += 3 {
		for i := range pageBytes / 8 {
			binary.LittleEndian.PutUint64(b[p*pageBytes+8*i:], uint64(p)<<32|uint64(i)|1<<63)
		}
	}
	return b
}

// checkpoint makes one whose RAM is in two parts, below and above 4 GiB, with a ROM
// at the top of the first.
func checkpoint(t testing.TB, ram []byte, edit func(m *image.Manifest)) *store.Image {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	state, err := os.ReadFile("../vm/vmstate/testdata/" + machine + ".state")
	must(err)
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	must(err)
	ctx := context.Background()
	txn, err := st.Begin(ctx, "web")
	must(err)
	defer txn.Abort()
	half := uint64(len(ram) / 2)
	blocks := []image.Block{
		{Name: "pc.ram", UsedBytes: 2 * half, TotalBytes: 2 * half, PageBytes: 8192, Main: true,
			Ranges: []image.GPARange{{GPA: fourGiB, Offset: half, Bytes: half}, {GPA: 0, Offset: 0, Bytes: pageBytes}, {GPA: pageBytes, Offset: pageBytes, Bytes: half - pageBytes}}},
		{Name: "pc.bios", UsedBytes: pageBytes, TotalBytes: 2 * pageBytes, PageBytes: pageBytes, ReadOnly: true,
			Ranges: []image.GPARange{{GPA: fourGiB - 2*pageBytes, Offset: 0, Bytes: 2 * pageBytes}}},
		{Name: "/rom@etc/acpi/rsdp", UsedBytes: 0, TotalBytes: pageBytes, PageBytes: pageBytes},
	}
	w, err := image.NewWriter(txn.Dir(), blocks, image.WriterOptions{})
	must(err)
	must(w.WritePages(0, 0, ram))
	must(w.WritePages(1, 0, bytes.Repeat([]byte("BIOS"), pageBytes/4)))
	must(w.WriteDeviceState(bytes.NewReader(state)))
	sum, err := w.Finish(ctx)
	must(err)
	m := &image.Manifest{Mode: "stop", Engine: "none",
		QEMU: image.QEMU{Version: "7.2.22", BinaryPath: "/usr/bin/qemu-system-x86_64"},
		Machine: image.Machine{Type: machine, Accel: "tcg", Facts: map[string]string{},
			Argv: []string{"qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "1", "-daemonize", "-incoming", "defer", "-S"}, Changes: []string{"-device", "virtio-rng-pci"}}}
	sum.Apply(m)
	if edit != nil {
		edit(m)
	}
	must(txn.Commit(ctx, m))
	img, err := st.OpenImage(ctx, txn.ID())
	must(err)
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	return img
}

func export(t testing.TB, img *store.Image, o Options) ([]byte, *Summary) {
	t.Helper()
	var out bytes.Buffer
	sum, err := Write(t.Context(), img.Reader, &out, o)
	if err != nil {
		t.Fatal(err)
	}
	if sum.Bytes != uint64(out.Len()) || sum.Format != o.Format || sum.VM != "web" {
		t.Errorf("%+v for %d bytes", sum, out.Len())
	}
	return out.Bytes(), sum
}

// sink keeps what a stream holds.
type sink struct {
	blocks []ramstream.Block
	ram    [][]byte
}

func (s *sink) Blocks(_ string, blocks []ramstream.Block) error {
	s.blocks = blocks
	for _, b := range blocks {
		s.ram = append(s.ram, make([]byte, b.UsedBytes))
	}
	return nil
}

func (s *sink) Page(block int, offset uint64, data []byte) error {
	copy(s.ram[block][offset:], data)
	return nil
}
func (s *sink) Zero(int, uint64) error { return nil }

func TestQEMU(t *testing.T) {
	img := checkpoint(t, content(), nil)
	out, _ := export(t, img, Options{Format: QEMU})
	s := &sink{}
	tail, err := ramstream.Decode(t.Context(), bytes.NewReader(out), s)
	if err != nil || tail.Machine != machine || len(s.ram) != 2 || !bytes.Equal(s.ram[0], content()) || string(s.ram[1][:8]) != "BIOSBIOS" {
		t.Errorf("%v, %+v", err, s.blocks)
	}
	state, err := img.DeviceState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if back, _, err := vmstate.FromTail(tail.Devices); err != nil || !bytes.Equal(back, state) {
		t.Errorf("the device state differs: %v", err)
	}
}

func TestLibvirt(t *testing.T) {
	const xml = "<domain type='qemu'>\n<name>web</name>\n</domain>\n"
	img := checkpoint(t, content(), func(m *image.Manifest) { m.Machine.Facts[image.FactGuestRuns] = "false" })
	if _, err := Write(t.Context(), img.Reader, io.Discard, Options{Format: Libvirt}); !problem.Is(err, problem.Refused) {
		t.Errorf("without XML: %v", err)
	}
	for _, bad := range []string{"<domain>", "domain", "<network/>", "<domain/>\x00"} {
		if _, err := Write(t.Context(), img.Reader, io.Discard, Options{Format: Libvirt, XML: bad}); !problem.Is(err, problem.Usage) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	stream, _ := export(t, img, Options{Format: QEMU})
	out, sum := export(t, img, Options{Format: Libvirt, XML: xml})
	if !sum.Paused || !bytes.HasSuffix(out, stream) || string(out[:16]) != saveMagic {
		t.Errorf("%+v", sum)
	}
	num := func(i int) uint32 { return binary.NativeEndian.Uint32(out[16+4*i:]) }
	if num(0) != 2 || int(num(1)) != len(out)-len(stream)-saveHeadBytes || num(2) != 0 || num(3) != 0 || num(4) != 0 {
		t.Errorf("head: % x", out[:saveHeadBytes])
	}
	if text, _, _ := bytes.Cut(out[saveHeadBytes:], []byte{0}); string(text) != xml {
		t.Errorf("XML: %q", text)
	}
}

func TestRaw(t *testing.T) {
	img := checkpoint(t, content(), nil)
	path := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := CreateFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := Write(t.Context(), img.Reader, f, Options{Format: Raw})
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Error("the file was there before it was whole")
	}
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	const half = ramPages * pageBytes / 2
	want := []Range{{GPA: 0, Bytes: half, Offset: 0, Block: "pc.ram"}, {GPA: fourGiB, Bytes: half, Offset: fourGiB, Block: "pc.ram"}}
	if diff := cmp.Diff(want, sum.Map); diff != "" {
		t.Error(diff)
	}
	g, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if st, err := g.Stat(); err != nil || st.Size() != fourGiB+half || uint64(st.Size()) != sum.Bytes || st.Mode() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	got := make([]byte, 2*half)
	if _, err := g.ReadAt(got[:half], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := g.ReadAt(got[half:], fourGiB); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content()) {
		t.Error("RAM differs")
	}
}

func TestELF(t *testing.T) {
	img := checkpoint(t, content(), nil)
	out, sum := export(t, img, Options{Format: ELF})
	f, err := elf.NewFile(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || sum.VCPUs != 1 || len(sum.Map) != 3 {
		t.Errorf("%+v, %+v", f.FileHeader, sum)
	}
	ram := content()
	const half = ramPages * pageBytes / 2
	want := map[uint64][]byte{0: ram[:half], fourGiB: ram[half:], fourGiB - 2*pageBytes: bytes.Repeat([]byte("BIOS"), pageBytes/4)}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD {
			continue
		}
		got, err := io.ReadAll(p.Open())
		if err != nil || !bytes.Equal(got, want[p.Paddr]) || p.Vaddr != p.Paddr || p.Align != 0 || p.Off%pageBytes != 0 {
			t.Errorf("%+v: %v", p.ProgHeader, err)
		}
		delete(want, p.Paddr)
	}
	if len(want) > 0 {
		t.Errorf("%d pieces of memory are missing", len(want))
	}
	if _, err := Write(t.Context(), img.Reader, io.Discard, Options{Format: ELF, Paging: true}); !problem.Is(err, problem.Refused) {
		t.Errorf("page tables of a CPU without paging: %v", err)
	}
}

// TestManySegments has more than the header can count.
func TestManySegments(t *testing.T) {
	loads := make([]load, 70000)
	for i := range loads {
		loads[i] = load{virt: uint64(i) << 13, phys: uint64(i) << 12, bytes: pageBytes, offset: 1 << 30}
	}
	b := elfHead(loads, uint64(elfHeadBytes+70001*elfSegmentBytes+elfSectionBytes), 0)
	if n := binary.LittleEndian.Uint16(b[56:]); n != 0xffff {
		t.Errorf("%d segments in the header", n)
	}
	at := binary.LittleEndian.Uint64(b[40:])
	if int(at)+elfSectionBytes != len(b) || binary.LittleEndian.Uint32(b[at+44:]) != 70001 {
		t.Errorf("section header at %d of %d bytes", at, len(b))
	}
}

func TestRefusals(t *testing.T) {
	write := func(img *store.Image, o Options) error {
		_, err := Write(t.Context(), img.Reader, io.Discard, o)
		return err
	}
	img := checkpoint(t, content(), nil)
	if err := write(img, Options{Format: "tar"}); !problem.Is(err, problem.Usage) || !strings.Contains(err.Error(), "elf, libvirt, qemu, raw") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Write(ctx, img.Reader, io.Discard, Options{Format: Raw}); !problem.Is(err, problem.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
	for _, f := range []Format{QEMU, Raw, ELF} {
		if _, err := Write(t.Context(), img.Reader, &full{left: 9000}, Options{Format: f}); !problem.Is(err, problem.Failed) || !errors.Is(err, errFull) {
			t.Errorf("%s to a writer that fails: %v", f, err)
		}
	}
	overlap := checkpoint(t, content(), func(m *image.Manifest) { m.Blocks[1].Ranges[0].GPA = 0 })
	if err := write(overlap, Options{Format: ELF}); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "two memories") {
		t.Errorf("%v", err)
	}
	nowhere := checkpoint(t, content(), func(m *image.Manifest) {
		m.Machine.Type = "microvm"
		for i := range m.Blocks {
			m.Blocks[i].Ranges = nil
		}
	})
	if err := write(nowhere, Options{Format: Raw}); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "microvm") {
		t.Errorf("%v", err)
	}
}

var errFull = errors.New("no room")

// full takes so many bytes.
type full struct{ left int }

func (f *full) Write(p []byte) (int, error) {
	if len(p) > f.left {
		return 0, errFull
	}
	f.left -= len(p)
	return len(p), nil
}

func TestConventional(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		machine string
		bytes   uint64
		below   uint64
	}{
		{"pc-i440fx-7.2", gib, gib}, {"pc-i440fx-7.2", 0xe0000000 - pageBytes, 0xe0000000 - pageBytes},
		{"pc-i440fx-7.2", 0xe0000000, 3 * gib}, {"pc-i440fx-10.0", 8 * gib, 3 * gib},
		{"pc-q35-7.2", gib, gib}, {"pc-q35-7.2", 0xb0000000 - pageBytes, 0xb0000000 - pageBytes},
		{"pc-q35-7.2", 0xb0000000, 2 * gib}, {"pc-q35-10.0", 5 * gib, 2 * gib},
	} {
		m := &image.Manifest{Machine: image.Machine{Type: c.machine}, Blocks: []image.Block{{Name: "pc.bios"}, {Name: "pc.ram", Main: true, UsedBytes: c.bytes}}}
		got, err := conventional(m)
		want := []physRange{{0, c.below, 1, 0}}
		if c.bytes > c.below {
			want = append(want, physRange{fourGiB, c.bytes - c.below, 1, c.below})
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s with %#x: %+v, %v; want %+v", c.machine, c.bytes, got, err, want)
		}
	}
	for name, m := range map[string]image.Manifest{
		"two RAMs": {Machine: image.Machine{Type: "pc-q35-7.2"}, Blocks: []image.Block{{Main: true}, {Main: true}}},
		"no RAM":   {Machine: image.Machine{Type: "pc-q35-7.2"}, Blocks: []image.Block{{}}},
		"moved":    {Machine: image.Machine{Type: "pc-q35-7.2", Argv: []string{"x", "-machine", "q35,max-ram-below-4g=1G"}}, Blocks: []image.Block{{Main: true}}},
	} {
		if got, err := conventional(&m); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestCommand(t *testing.T) {
	img := checkpoint(t, content(), nil)
	got, err := Command(img.Manifest(), "fd:0")
	want := []string{"/usr/bin/qemu-system-x86_64", "-machine", "type=" + machine + ",accel=tcg", "-m", "1", "-device", "virtio-rng-pci", "-incoming", "fd:0"}
	if err != nil {
		t.Fatal(err)
	}
	if got[2] == machine+",accel=tcg" {
		want[2] = got[2]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	paused := *img.Manifest()
	paused.Machine.Facts = map[string]string{image.FactGuestRuns: "false"}
	if got, err := Command(img.Manifest(), "exec:cat x"); err != nil || !slices.Contains(got, "-daemonize") {
		t.Errorf("%q, %v", got, err)
	}
	paused.Machine.Argv = []string{"qemu", "-m", "1"}
	if got, err = Command(&paused, "exec:cat x"); err != nil || !slices.Equal(got[1:3], []string{"-machine", machine}) || got[len(got)-1] != "-S" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := Command(&image.Manifest{}, "fd:0"); !problem.Is(err, problem.Refused) {
		t.Errorf("without a command line: %v", err)
	}
}

func TestDisksAreNamed(t *testing.T) {
	m := &image.Manifest{Disks: []image.Disk{
		{Name: "a", Path: "/i/a.qcow2", Method: image.DiskBackup, Volumes: []image.Volume{{Name: "x-0.qcow2"}, {Name: "w-0.qcow2"}}},
		{Name: "b", Path: "/i/b.qcow2", Method: image.DiskSnapshot, Snapshot: "ck"},
		{Name: "c", Path: "/i/c.raw", Method: image.DiskNone},
		{Name: "d", Path: "/i/d.raw", Method: image.DiskOverlay},
	}}
	got := disks(m, "/s/vms/web/x")
	want := []Disk{
		{Name: "a", Path: "/i/a.qcow2", Method: "backup", Volume: "/s/vms/web/disks/x-0.qcow2"},
		{Name: "b", Path: "/i/b.qcow2", Method: "snapshot", Snapshot: "ck"},
		{Name: "c", Path: "/i/c.raw", Method: "none"},
		{Name: "d", Path: "/i/d.raw", Method: "overlay"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for i, words := range []string{"/s/vms/web/disks/x-0.qcow2", "-a ck", "left out", "overlays"} {
		if a := got[i].Advice(); !strings.Contains(a, words) {
			t.Errorf("%s: %q", got[i].Name, a)
		}
	}
}

func TestFileAbort(t *testing.T) {
	dir := t.TempDir()
	f, err := CreateFile(filepath.Join(dir, "x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := f.Abort(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := CreateFile(filepath.Join(dir, "none", "x")); !problem.Is(err, problem.Failed) {
		t.Errorf("no such directory: %v", err)
	}
}

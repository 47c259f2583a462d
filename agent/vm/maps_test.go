package vm

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
)

func contains(s, sub string) bool { return strings.Contains(s, sub) }

func testdata(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestParseMapLine(t *testing.T) {
	v, err := parseMapLine("7fac1ffff000-7fac2ffff000 rw-s 00001000 fe:01 1035                       /memfd:a b (deleted)")
	if err != nil {
		t.Fatal(err)
	}
	want := VMA{Start: 0x7fac1ffff000, End: 0x7fac2ffff000, Perms: "rw-s", Offset: 0x1000, Major: 0xfe, Minor: 1, Inode: 1035, Path: "/memfd:a b (deleted)"}
	if !reflect.DeepEqual(v, want) {
		t.Errorf("got %+v, want %+v", v, want)
	}
	if !v.Shared() || !v.Writable() || !v.Deleted() || v.Bytes() != 0x10000000 {
		t.Errorf("properties of %+v", v)
	}
	for _, bad := range []string{
		"", "x", "2000-1000 rw-p 0 0:0 0", "1000-1000 rw-p 0 0:0 0", "1000-2000 rw 0 0:0 0",
		"1000-2000 rwzp 0 0:0 0", "1000-2000 rw-p 0 0 0", "1000-2000 rw-p 0 0:0 x", "10000000000000000-2 rw-p 0 0:0 0",
	} {
		if _, err := parseMapLine(bad); err == nil {
			t.Errorf("parseMapLine(%q) succeeded", bad)
		}
	}
}

func TestParseSmapsOfQEMU(t *testing.T) {
	vmas, err := parseSmaps(strings.NewReader(testdata(t, "smaps-7.2.txt")))
	if err != nil {
		t.Fatal(err)
	}
	var dc int
	for i := range vmas {
		if vmas[i].Is("dc") {
			dc++
			if vmas[i].PageBytes != 4096 {
				t.Errorf("page size %d at %x", vmas[i].PageBytes, vmas[i].Start)
			}
		}
	}
	lines, err := parseRAMBlocks(testdata(t, "ramblock-7.2.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if dc != len(lines) {
		t.Errorf("%d mappings marked dc for %d blocks", dc, len(lines))
	}
}

func TestSmapsOfThisProcess(t *testing.T) {
	p, err := openAny(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	vmas, err := p.ReadSmaps()
	if err != nil {
		t.Fatal(err)
	}
	var rss uint64
	for i := range vmas {
		rss += vmas[i].RSSBytes
		if vmas[i].Flags == nil {
			t.Errorf("no flags at %x", vmas[i].Start)
		}
		if i > 0 && vmas[i-1].End > vmas[i].Start {
			t.Errorf("mappings overlap at %x", vmas[i].Start)
		}
	}
	if rss == 0 {
		t.Error("no page present in a running process")
	}
}

func TestParseSmapsRefuses(t *testing.T) {
	for _, bad := range []string{
		"Rss: 4 kB\n",
		"1000-2000 rw-p 0 0:0 0 \nRss: 4\n",
		"1000-2000 rw-p 0 0:0 0 \nRss: x kB\n",
		"1000-2000 rw-p 0 0:0 0 \nRss: 99999999999999999999 kB\n",
		"1000-2000 rw-p 0 0:0 0 \nVmFlags: " + strings.Repeat("rd ", 300) + "\n",
		"1000-2000 rw-p 0 0:0 0 " + strings.Repeat("x", maxMapLine) + "\n",
	} {
		if v, err := parseSmaps(strings.NewReader(bad)); err == nil {
			t.Errorf("parseSmaps(%.60q): %d mappings", bad, len(v))
		}
	}
}

func TestVMAsAt(t *testing.T) {
	vmas := []VMA{
		{Start: 0x1000, End: 0x3000, Perms: "rw-p"},
		{Start: 0x3000, End: 0x4000, Perms: "rw-p"},
		{Start: 0x4000, End: 0x5000, Perms: "---p"},
		{Start: 0x6000, End: 0x8000, Perms: "rw-s", Inode: 7, Offset: 0x1000},
		{Start: 0x8000, End: 0x9000, Perms: "rw-s", Inode: 7, Offset: 0x3000},
		{Start: 0x9000, End: 0xa000, Perms: "rw-s", Inode: 7, Offset: 0x9000},
	}
	for _, c := range []struct {
		start, length uint64
		want          int
	}{
		{0x1000, 0x2000, 1}, {0x1000, 0x3000, 2}, {0x1000, 0x4000, 0}, {0x1000, 0x1000, 0}, {0x2000, 0x1000, 0},
		{0x6000, 0x3000, 2}, {0x6000, 0x4000, 0}, {0x3000, 0x1000, 1}, {0xb000, 0x1000, 0}, {0x1000, 0, 0},
		{0x1000, ^uint64(0), 0},
	} {
		if got := len(vmasAt(vmas, c.start, c.length)); got != c.want {
			t.Errorf("vmasAt(%#x, %#x): %d mappings, want %d", c.start, c.length, got, c.want)
		}
	}
}

func TestParseRAMBlocks(t *testing.T) {
	old, err := parseRAMBlocks(testdata(t, "ramblock-7.2.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (ramblockLine{name: "0000:00:03.0/virtio-net-pci.rom", pageBytes: 4096, offset: 0x19100000, used: 0x40000, total: 0x40000}); old[6] != want {
		t.Errorf("got %+v, want %+v", old[6], want)
	}
	recent, err := parseRAMBlocks(testdata(t, "ramblock-10.0.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if len(recent) != len(old) {
		t.Errorf("%d blocks by 10.0, %d by 7.2", len(recent), len(old))
	}
	for _, b := range recent {
		if b.hva == 0 {
			t.Errorf("%s: no host address", b.name)
		}
		if romName(b.name) != b.readOnly && !strings.HasPrefix(b.name, "pc.") && b.name != "isa-bios" {
			t.Errorf("%s: read-only %v, by name %v", b.name, b.readOnly, romName(b.name))
		}
	}
	head := "Block Name PSize Offset Used Total\n"
	row := " pc.ram    4 KiB  0x0000000000000000 0x0000000000001000 0x0000000000001000\n"
	for _, bad := range []string{
		"", head, "nonsense\n" + row, head + row + row, head + " pc.ram 4 KiB 0x0\n",
		head + " a  3 KiB  0x0000000000000000 0x0000000000001000 0x0000000000001000\n",
		head + " a  4 KiB  0x0000000000000000 0x0000000000002000 0x0000000000001000\n",
		head + " a  4 KiB  0x0000000000000000 0x0000000000000000 0x0000000000000000\n",
		head + " a  0 KiB  0x0000000000000000 0x0000000000001000 0x0000000000001000\n",
	} {
		if b, err := parseRAMBlocks(bad); !errors.Is(err, errHMP) {
			t.Errorf("parseRAMBlocks(%.80q) = %v, %v", bad, b, err)
		}
	}
}

func TestParseFlatView(t *testing.T) {
	for _, version := range []string{"7.2", "10.0"} {
		flat, err := parseFlatView(testdata(t, "mtree-"+version+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		want := []flatRange{
			{0, 0xa0000, "ram", "mm", 0},
			{0xc0000, 0x20000, "rom", "pc.rom", 0},
			{0xe0000, 0x20000, "rom", "pc.bios", 0x20000},
			{0x100000, 0xff00000, "ram", "mm", 0x100000},
			{0xfffc0000, 0x40000, "rom", "pc.bios", 0},
			{0x100000000, 0x8000000, "ram", "m1", 0},
		}
		if !reflect.DeepEqual(flat, want) {
			t.Errorf("%s: got %+v", version, flat)
		}
	}
	text := "FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n  0000000000000000-0000000000000fff (prio 0, ram): pc.ram @0000000000001000 KVM\n"
	if flat, err := parseFlatView(text); err != nil || len(flat) != 1 || flat[0].region != "pc.ram" || flat[0].offset != 0x1000 {
		t.Errorf("under KVM: %+v, %v", flat, err)
	}
	if _, err := parseFlatView("FlatView #0\n AS \"I/O\", root: io\n"); !errors.Is(err, errHMP) {
		t.Errorf("without memory: %v", err)
	}
}

func TestParseGPA2HVA(t *testing.T) {
	region, hva, ok, err := parseGPA2HVA("Host virtual address for 0xfffc0000 (pc.bios) is 0x7f7a65c00000\r\n", 0xfffc0000)
	if region != "pc.bios" || hva != 0x7f7a65c00000 || !ok || err != nil {
		t.Errorf("got %q %#x %v %v", region, hva, ok, err)
	}
	for _, none := range []string{"No memory is mapped at address 0xfd000000\r\n", "Memory at address 0xfec00000 is not RAM\r\n"} {
		if _, _, ok, err := parseGPA2HVA(none, 1); ok || err != nil {
			t.Errorf("%q: %v %v", none, ok, err)
		}
	}
	for _, bad := range []string{"", "Host virtual address for 0x1 (a) is 0x0", "Host virtual address for 0x2 (a) is 0x1000"} {
		if _, _, _, err := parseGPA2HVA(bad, 1); !errors.Is(err, errHMP) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func FuzzSmaps(f *testing.F) {
	f.Add([]byte("1000-3000 rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr dc\n2000-4000 rw-s 00001000 fe:01 9 /a b\n"))
	f.Add([]byte("7fac1ffff000-7fac2ffff000 rw-s 00000000 00:01 1035  /memfd:x (deleted)\nVmFlags:\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, parse := range []func() ([]VMA, error){
			func() ([]VMA, error) { return parseSmaps(bytes.NewReader(b)) },
			func() ([]VMA, error) { return parseMaps(bytes.NewReader(b)) },
		} {
			vmas, err := parse()
			if err != nil {
				continue
			}
			for i := range vmas {
				v := &vmas[i]
				if v.End <= v.Start || len(v.Perms) != 4 || i > 0 && vmas[i-1].End > v.Start {
					t.Fatalf("mapping %d of %+v", i, vmas)
				}
				if at := vmasAt(vmas, v.Start, v.Bytes()); len(at) != 1 || at[0].Start != v.Start {
					t.Fatalf("vmasAt does not find %+v", v)
				}
			}
		}
	})
}

func FuzzMonitorText(f *testing.F) {
	for _, version := range []string{"7.2", "10.0"} {
		f.Add(testdata(f, "ramblock-"+version+".txt"))
		f.Add(testdata(f, "mtree-"+version+".txt"))
	}
	f.Add("Host virtual address for 0x1 (pc.ram) is 0x7f79d7e00000")
	f.Fuzz(func(t *testing.T, s string) {
		if blocks, err := parseRAMBlocks(s); err == nil {
			for i := range blocks {
				if b := &blocks[i]; b.name == "" || b.used > b.total || b.total == 0 || b.pageBytes < 4096 {
					t.Fatalf("accepted %+v", *b)
				}
			}
		}
		if flat, err := parseFlatView(s); err == nil {
			for _, r := range flat {
				if r.bytes == 0 || r.region == "" {
					t.Fatalf("accepted %+v", r)
				}
			}
		}
		if _, hva, ok, err := parseGPA2HVA(s, 1); ok && (err != nil || hva == 0) {
			t.Fatal("an address that is none")
		}
	})
}

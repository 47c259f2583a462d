package vmstate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

const pcMachine = "pc-i440fx-7.2"

// pcState is what QEMU 7.2 wrote for `-machine pc -nodefaults` stopped in SeaBIOS.
func pcState(t testing.TB) []byte {
	b, err := os.ReadFile("testdata/" + pcMachine + ".state")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStreamWrapsBothEnds(t *testing.T) {
	dev := pcState(t)
	got, err := Stream(pcMachine, dev)
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte("QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0d"+pcMachine), dev[8:]...)
	want = append(want, "\x06\x00\x00\x00\x02{}"...)
	if !bytes.Equal(got, want) {
		t.Fatalf("stream differs: %d bytes, want %d", len(got), len(want))
	}
}

// A stream's sections are the state's, moved by the configuration section.
func TestParseSectionsSurviveStream(t *testing.T) {
	dev := pcState(t)
	a, err := Parse(dev)
	if err != nil {
		t.Fatal(err)
	}
	if a.Machine != "" || a.Description != nil {
		t.Errorf("device state has machine %q, description %q", a.Machine, a.Description)
	}
	byName := map[string]Section{}
	for _, s := range a.Sections {
		byName[s.Name] = s
	}
	for _, name := range []string{"timer", "cpu_common", "cpu", "apic", "0000:00:00.0/I440FX", "globalstate"} {
		s, ok := byName[name]
		if !ok {
			t.Errorf("no section %q among %d", name, len(a.Sections))
			continue
		}
		if s.Bytes <= 0 || s.Offset+s.Bytes > len(dev) {
			t.Errorf("section %q at %d has %d bytes", name, s.Offset, s.Bytes)
		}
	}
	if g := byName["globalstate"]; !bytes.Contains(dev[g.Offset:g.Offset+g.Bytes], []byte("running")) {
		t.Errorf("globalstate is not where the listing says")
	}
	st, err := Stream(pcMachine, dev)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Parse(st)
	if err != nil {
		t.Fatal(err)
	}
	if b.Machine != pcMachine || string(b.Description) != vmDescription {
		t.Errorf("stream has machine %q, description %q", b.Machine, b.Description)
	}
	if len(a.Sections) != len(b.Sections) {
		t.Fatalf("%d sections became %d", len(a.Sections), len(b.Sections))
	}
	for i, s := range a.Sections {
		s.Offset += 5 + len(pcMachine)
		if s != b.Sections[i] {
			t.Errorf("section %d: %+v, want %+v", i, b.Sections[i], s)
		}
	}
}

func TestStreamOfStreamIsChecked(t *testing.T) {
	// A QEMU that writes the configuration itself: same machine is kept, another refused.
	dev := append([]byte("QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0d"+pcMachine), pcState(t)[8:]...)
	got, err := Stream(pcMachine, dev)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(got, []byte("\x07\x00\x00\x00\x0d"+pcMachine)); n != 1 {
		t.Errorf("configuration stands there %d times", n)
	}
	if _, err := Stream("pc-q35-7.2", dev); !errors.Is(err, ErrFormat) {
		t.Errorf("another machine's state: %v", err)
	}
}

func TestStreamRefuses(t *testing.T) {
	dev := pcState(t)
	mod := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(dev)) }
	for _, c := range []struct {
		name string
		in   []byte
		want error
	}{
		{"empty", nil, ErrTruncated},
		{"header only", dev[:8], ErrTruncated},
		{"other magic", mod(func(b []byte) []byte { b[0] = 'X'; return b }), ErrFormat},
		{"other version", mod(func(b []byte) []byte { b[7] = 2; return b }), ErrFormat},
		{"no section", mod(func(b []byte) []byte { b[8] = 0x33; return b }), ErrFormat},
		{"last byte missing", dev[:len(dev)-1], ErrTruncated},
		{"half", mod(func(b []byte) []byte { return append(b[:len(b)/2], 1) }), ErrTruncated},
		{"footer missing", mod(func(b []byte) []byte { return append(b[:len(b)-6], 0) }), ErrTruncated},
	} {
		if _, err := Stream(pcMachine, c.in); !errors.Is(err, c.want) || !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if _, err := Stream("", dev); err == nil {
		t.Error("no machine type was accepted")
	}
}

func TestParseEveryPrefixIsTruncated(t *testing.T) {
	dev := pcState(t)
	for n := 0; n < len(dev); n += 7 {
		if _, err := Parse(dev[:n]); !errors.Is(err, ErrFormat) {
			t.Fatalf("prefix of %d bytes: %v", n, err)
		}
	}
}

func TestModernFormat(t *testing.T) {
	for name, want := range map[string]bool{
		"pc-i440fx-7.2": true, "pc-q35-10.0": true, "pc-q35-4.0.1": true, "none": true, "microvm": true, "xen-hvm": true,
		"pc-i440fx-2.12": true, "pc-i440fx-2.4": true, "pc-i440fx-2.3": false, "pc-i440fx-1.7": false,
	} {
		if got := modernFormat(name); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("QEVM\x00\x00\x00\x03\x04\x00\x00\x00\x01\x01a\x00\x00\x00\x00\x00\x00\x00\x01xy\x7e\x00\x00\x00\x01\x00"))
	f.Add([]byte("QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x01m\x04\x00\x00\x00\x01\x01a\x00\x00\x00\x00\x00\x00\x00\x01\x7e\x00\x00\x00\x01\x00\x06\x00\x00\x00\x02{}"))
	f.Add([]byte("QEVM\x00\x00\x00\x03\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		end := headerBytes
		for _, s := range l.Sections {
			if s.Offset < end || s.Bytes < 0 || s.Offset+s.Bytes+footerBytes > len(b) {
				t.Fatalf("section outside the input: %+v", s)
			}
			end = s.Offset + s.Bytes + footerBytes
		}
	})
}

func FuzzStream(f *testing.F) {
	f.Add(pcMachine, []byte("QEVM\x00\x00\x00\x03\x04\x00\x00\x00\x01\x01a\x00\x00\x00\x00\x00\x00\x00\x01xy\x7e\x00\x00\x00\x01\x00"))
	f.Add("pc-i440fx-2.2", []byte("QEVM\x00\x00\x00\x03\x04\x00"))
	f.Fuzz(func(t *testing.T, machine string, b []byte) {
		out, err := Stream(machine, b)
		if err != nil {
			return
		}
		if len(out) < len(b) || !bytes.Equal(out[:headerBytes], b[:headerBytes]) || !bytes.Contains(out, b[headerBytes:]) {
			t.Fatal("the state is not in the stream")
		}
		// What lists as a state lists as a stream of this machine, section by
		// section, unless payloads imitate footers: sections carry no length, so
		// where such a one ends depends on what follows.
		l, err := Parse(b)
		if err == nil && modernFormat(machine) && l.Description == nil && bytes.Count(b, []byte{typeFooter}) == len(l.Sections) {
			s, err := Parse(out)
			if err != nil || s.Machine != machine || len(s.Sections) != len(l.Sections) {
				t.Fatalf("stream lists differently: %v", err)
			}
		}
	})
}

func TestSplitIsStream(t *testing.T) {
	dev := pcState(t)
	head, tail, err := Split(pcMachine, dev)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := Stream(pcMachine, dev)
	if err != nil || !bytes.Equal(append(head, tail...), whole) {
		t.Errorf("the two pieces are not the stream: %v", err)
	}
	// What stands between them is RAM: its section gets a number of its own.
	id, err := FreeID(dev)
	if err != nil || id == 0 {
		t.Fatalf("%d, %v", id, err)
	}
	l, err := Parse(dev)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Sections {
		if s.ID == id {
			t.Errorf("section %s has number %d as well", s.Name, id)
		}
	}
	back, _, err := FromTail(tail)
	if err != nil || !bytes.Equal(back, dev) {
		t.Errorf("the tail is not the state: %v", err)
	}
}

func TestFromTailChecksDescription(t *testing.T) {
	dev := pcState(t)
	l, err := Parse(dev)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range l.Sections {
		names = append(names, fmt.Sprintf(`{"name": %q, "instance_id": %d}`, s.Name, s.Instance))
	}
	tail := func(devices []string) []byte {
		text := `{"page_size": 4096, "devices": [` + strings.Join(devices, ", ") + "]}"
		b := append(bytes.Clone(dev[headerBytes:]), typeVMDesc)
		b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
		return append(b, text...)
	}
	if back, _, err := FromTail(tail(names)); err != nil || !bytes.Equal(back, dev) {
		t.Errorf("%v", err)
	}
	other := slices.Clone(names)
	other[3] = `{"name": "other", "instance_id": 0}`
	for name, list := range map[string][]string{"one is missing": names[1:], "another": other} {
		if _, _, err := FromTail(tail(list)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{"empty": nil, "end mark alone": {typeEOF}, "cut": dev[headerBytes : len(dev)-9]} {
		if _, _, err := FromTail(b); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// section is one by hand.
func section(id byte, name, payload string) string {
	return "\x04\x00\x00\x00" + string(rune(id)) + string(rune(len(name))) + name + "\x00\x00\x00\x00\x00\x00\x00\x01" + payload +
		"\x7e\x00\x00\x00" + string(rune(id))
}

// TestNumbersNeedNotRise lists a machine whose buses were made late and are saved
// early, as QEMU does with PCI bridges.
func TestNumbersNeedNotRise(t *testing.T) {
	const head = "QEVM\x00\x00\x00\x03"
	l, err := Parse([]byte(head + section(40, "bridge", "xy") + section(3, "disk", "z") + "\x00"))
	if err != nil || len(l.Sections) != 2 || l.Sections[1].Name != "disk" || l.Sections[0].Bytes != 2 {
		t.Errorf("%+v, %v", l, err)
	}
	if l, err := Parse([]byte(head + section(4, "a", "") + section(4, "b", "") + "\x00")); err == nil && len(l.Sections) > 1 {
		t.Errorf("two sections of one number: %+v", l)
	}
}

// TestPayloadThatImitates has a section whose payload looks like its end and another
// section. Only a description tells the two apart.
func TestPayloadThatImitates(t *testing.T) {
	inner := section(9, "fake", "")
	body := section(1, "a", "q\x7e\x00\x00\x00\x01"+inner) + section(2, "b", "")
	describe := func(names ...string) string {
		for i, n := range names {
			names[i] = fmt.Sprintf(`{"name": %q, "instance_id": 0}`, n)
		}
		text := `{"devices": [` + strings.Join(names, ",") + "]}"
		return "\x00\x06\x00\x00\x00" + string(rune(len(text))) + text
	}
	_, l, err := FromTail([]byte(body + describe("a", "b")))
	if err != nil || len(l.Sections) != 2 || l.Sections[0].Bytes != 6+len(inner) {
		t.Errorf("%+v, %v", l, err)
	}
	for name, list := range map[string][]string{"too few": {"a"}, "too many": {"a", "b", "c"}, "others": {"a", "c"}, "order": {"b", "a"}} {
		if _, l, err := FromTail([]byte(body + describe(list...))); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}

func TestRunState(t *testing.T) {
	dev := pcState(t)
	l, err := Parse(dev)
	if err != nil {
		t.Fatal(err)
	}
	if s := RunState(dev, l); s != "running" {
		t.Errorf("%q", s)
	}
	if s := RunState(dev, &Listing{}); s != "" {
		t.Errorf("%q without a section", s)
	}
}

// TestCPUs reads the registers of a vCPU in SeaBIOS: protected mode without paging,
// flat segments, in the ROM below 1 MiB.
func TestCPUs(t *testing.T) {
	cpus, err := CPUs(pcState(t))
	if err != nil || len(cpus) != 1 {
		t.Fatalf("%d, %v", len(cpus), err)
	}
	c := cpus[0]
	if c.Instance != 0 || c.CR != [5]uint64{0x11} || c.EFER != 0 || c.RFLAGS != 2 || c.RIP < 0xe0000 || c.RIP >= 1<<20 {
		t.Errorf("not a CPU in protected mode: %+v", c)
	}
	for i, s := range c.Segs {
		want := Segment{Selector: 16, Limit: 0xffffffff, Flags: 0xcf9300}
		if i == CS {
			want.Selector, want.Flags = 8, 0xcf9b00
		}
		if s != want {
			t.Errorf("segment %d: %+v, want %+v", i, s, want)
		}
	}
	if c.GDT.Limit != 55 || c.GDT.Base < 0xe0000 || c.GDT.Base >= 1<<20 {
		t.Errorf("descriptor table: %+v", c.GDT)
	}
	dev := pcState(t)
	l, err := Parse(dev)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l.Sections {
		if s.Name == "cpu" {
			binary.BigEndian.PutUint32(dev[s.Offset-4:], 11)
		}
	}
	if _, err := CPUs(dev); !errors.Is(err, ErrFormat) {
		t.Errorf("another version: %v", err)
	}
}

func FuzzFromTail(f *testing.F) {
	f.Add([]byte("\x04\x00\x00\x00\x01\x01a\x00\x00\x00\x00\x00\x00\x00\x01xy\x7e\x00\x00\x00\x01\x00"))
	f.Add([]byte("\x04\x00\x00\x00\x01\x03cpu\x00\x00\x00\x00\x00\x00\x00\x0cxy\x7e\x00\x00\x00\x01\x00\x06\x00\x00\x00\x10{\"devices\": [{}]}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		state, l, err := FromTail(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		RunState(state, l)
		if _, err := CPUs(state); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatalf("error without a kind: %v", err)
		}
		if !bytes.Equal(state[headerBytes:], b[:len(state)-headerBytes]) {
			t.Fatal("the state is not the beginning of the tail")
		}
	})
}

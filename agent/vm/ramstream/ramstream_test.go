package ramstream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a Sink that keeps everything.
type memory struct {
	machine string
	blocks  []Block
	ram     map[string][]byte
	sent    map[string]int // pages, however often
	limit   uint64         // of RAM, for the fuzzer
}

var errTooMuch = errors.New("more RAM than this test wants")

func (m *memory) Blocks(machine string, blocks []Block) error {
	m.machine, m.blocks, m.ram, m.sent = machine, blocks, map[string][]byte{}, map[string]int{}
	var total uint64
	for _, b := range blocks {
		if total += b.UsedBytes; m.limit > 0 && total > m.limit {
			return errTooMuch
		}
	}
	for _, b := range blocks {
		m.ram[b.Name] = bytes.Repeat([]byte{0xee}, int(b.UsedBytes))
	}
	return nil
}

func (m *memory) put(block int, offset uint64, data []byte) error {
	name := m.blocks[block].Name
	copy(m.ram[name][offset:offset+PageBytes], data)
	m.sent[name]++
	return nil
}

func (m *memory) Page(block int, offset uint64, data []byte) error {
	return m.put(block, offset, data)
}

func (m *memory) Zero(block int, offset uint64) error {
	return m.put(block, offset, make([]byte, PageBytes))
}

const testHead = "QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0dpc-i440fx-7.2"
const testTail = "\x04\x00\x00\x00\x05\x01a\x00\x00\x00\x00\x00\x00\x00\x01xy\x7e\x00\x00\x00\x05\x00"

func page(seed byte) []byte { return bytes.Repeat([]byte{seed, 1, 2, 3}, PageBytes/4) }

// encoded is a stream of two blocks with content and an empty one.
func encoded(t testing.TB, footers bool) []byte {
	t.Helper()
	var out bytes.Buffer
	e := NewEncoder(&out, 2, footers)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(e.Begin([]byte(testHead), []Block{{"pc.ram", 4 * PageBytes}, {"none", 0}, {"pc.bios", 2 * PageBytes}}))
	must(e.Page(0, 0, page(1)))
	must(e.Zero(0, PageBytes))
	must(e.Page(0, 3*PageBytes, page(2)))
	must(e.Zero(2, PageBytes))
	must(e.Page(2, 0, page(3)))
	must(e.Page(0, 2*PageBytes, page(4)))
	must(e.Page(0, 0, page(5))) // again
	must(e.End([]byte(testTail)))
	return out.Bytes()
}

func TestRoundTrip(t *testing.T) {
	m := &memory{}
	tail, err := Decode(t.Context(), bytes.NewReader(encoded(t, true)), m)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]byte{
		"pc.ram":  bytes.Join([][]byte{page(5), make([]byte, PageBytes), page(4), page(2)}, nil),
		"pc.bios": bytes.Join([][]byte{page(3), make([]byte, PageBytes)}, nil),
	}
	if diff := cmp.Diff(want, m.ram); diff != "" {
		t.Error(diff)
	}
	if string(tail.Devices) != testTail || tail.Machine != "pc-i440fx-7.2" || m.machine != tail.Machine {
		t.Errorf("%+v, machine %q", tail, m.machine)
	}
	// Without footers the end of a section cannot be told from what follows it.
	if _, err := Decode(t.Context(), bytes.NewReader(encoded(t, false)), &memory{}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without footers: %v", err)
	}
}

func TestEveryPrefixIsTruncated(t *testing.T) {
	whole := encoded(t, true)
	end := len(whole) - len(testTail)
	for n := 0; n < end; n += 61 {
		if _, err := Decode(t.Context(), bytes.NewReader(whole[:n]), &memory{}); !errors.Is(err, ErrTruncated) {
			t.Fatalf("prefix of %d bytes: %v", n, err)
		}
	}
}

func TestEncoderRefuses(t *testing.T) {
	for name, f := range map[string]func(e *Encoder) error{
		"no name":          func(e *Encoder) error { return e.Begin(nil, []Block{{"", PageBytes}}) },
		"long name":        func(e *Encoder) error { return e.Begin(nil, []Block{{strings.Repeat("x", 256), PageBytes}}) },
		"half a page":      func(e *Encoder) error { return e.Begin(nil, []Block{{"a", 100}}) },
		"outside":          func(e *Encoder) error { return e.Page(0, PageBytes, page(1)) },
		"unaligned":        func(e *Encoder) error { return e.Zero(0, 8) },
		"no such block":    func(e *Encoder) error { return e.Zero(1, 0) },
		"part of a page":   func(e *Encoder) error { return e.Page(0, 0, page(1)[:9]) },
		"negative block":   func(e *Encoder) error { return e.Zero(-1, 0) },
		"the writer fails": func(e *Encoder) error { return e.End(make([]byte, encoderBytes+1)) },
	} {
		w := &failing{}
		e := NewEncoder(w, 1, true)
		if err := e.Begin(nil, []Block{{"a", PageBytes}}); err != nil {
			t.Fatal(err)
		}
		if err := f(e); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, os.ErrClosed }

// piece builds streams by hand.
type piece struct{ b []byte }

func (p *piece) add(s ...any) *piece {
	for _, v := range s {
		switch v := v.(type) {
		case string:
			p.b = append(p.b, v...)
		case int:
			p.b = append(p.b, byte(v))
		case uint16:
			p.b = binary.BigEndian.AppendUint16(p.b, v)
		case uint32:
			p.b = binary.BigEndian.AppendUint32(p.b, v)
		case uint64:
			p.b = binary.BigEndian.AppendUint64(p.b, v)
		case []byte:
			p.b = append(p.b, v...)
		default:
			panic(fmt.Sprintf("%T", v))
		}
	}
	return p
}

func start() *piece { return new(piece).add(testHead) }

// ram is a stream up to the first page record.
func ram() *piece {
	return start().add(0x01, uint32(2), 3, "ram", uint32(0), uint32(4), uint64(2*PageBytes|flagMemSize), 1, "a", uint64(2*PageBytes),
		uint64(flagEOS), 0x7e, uint32(2), 0x02, uint32(2))
}

func TestRefusals(t *testing.T) {
	sub := func(name string) *piece { return start().add(0x05, len(name), name, uint32(1)) }
	list := func(total uint64) *piece {
		return start().add(0x01, uint32(2), 3, "ram", uint32(0), uint32(4), total|flagMemSize)
	}
	const caps = "configuration/capabilities"
	for name, c := range map[string]struct {
		in    *piece
		want  error
		words string
	}{
		"xbzrle":             {ram().add(uint64(flagXBZRLE), 1, "a"), ErrUnsupported, "xbzrle"},
		"compressed":         {ram().add(uint64(flagCompressed), 1, "a"), ErrUnsupported, "compress"},
		"multifd":            {ram().add(uint64(flagMultifd)), ErrUnsupported, "multifd"},
		"RDMA":               {ram().add(uint64(flagHook)), ErrUnsupported, "RDMA"},
		"flag of nobody":     {ram().add(uint64(0x800)), ErrFormat, "0x800"},
		"post-copy":          {start().add(0x08, uint16(3), uint16(16), make([]byte, 16)), ErrUnsupported, "post"},
		"long command":       {start().add(0x08, uint16(2), uint16(60000)), ErrFormat, "60000"},
		"mapped-ram":         {sub(caps).add(uint32(1), 10, "mapped-ram"), ErrUnsupported, "mapped-ram"},
		"other subsection":   {sub("configuration/x"), ErrUnsupported, "configuration/x"},
		"large pages":        {sub("configuration/target-page-bits").add(uint32(16)), ErrUnsupported, "2^16"},
		"dirty bitmaps":      {start().add(0x01, uint32(3), 12, "dirty-bitmap", uint32(0), uint32(1)), ErrUnsupported, "dirty-bitmap"},
		"device before RAM":  {start().add(0x04, uint32(3), 4, "vmem", uint32(0), uint32(1)), ErrUnsupported, "vmem"},
		"RAM of the future":  {start().add(0x01, uint32(3), 3, "ram", uint32(0), uint32(5)), ErrUnsupported, "version 5"},
		"other magic":        {new(piece).add("QEVX", uint32(3)), ErrFormat, "QEVX"},
		"other version":      {new(piece).add("QEVM", uint32(2)), ErrFormat, "version 2"},
		"huge machine type":  {new(piece).add("QEVM", uint32(3), 0x07, uint32(1<<30)), ErrFormat, "machine type"},
		"binary machine":     {new(piece).add("QEVM", uint32(3), 0x07, uint32(1), 7), ErrFormat, "machine type"},
		"config twice":       {start().add(0x07, uint32(1), "x"), ErrFormat, "configuration"},
		"huge RAM":           {list(1 << 60), ErrFormat, "bytes of RAM"},
		"block beyond total": {list(PageBytes).add(1, "a", uint64(2*PageBytes)), ErrFormat, "left"},
		"half a page":        {list(PageBytes).add(1, "a", uint64(5)), ErrFormat, "left"},
		"block twice":        {list(2*PageBytes).add(1, "a", uint64(PageBytes), 1, "a", uint64(PageBytes)), ErrFormat, "already"},
		"no block name":      {list(PageBytes).add(0, uint64(PageBytes)), ErrFormat, "RAMBlock"},
		"unknown block":      {ram().add(uint64(flagZero), 1, "b", 0), ErrFormat, "not in the list"},
		"page outside":       {ram().add(uint64(2*PageBytes|flagZero), 1, "a", 0), ErrFormat, "0x2000"},
		"continue what":      {ram().add(uint64(flagZero|flagContinue), 0), ErrFormat, "names no block"},
		"list twice":         {ram().add(uint64(PageBytes | flagMemSize)), ErrFormat, "twice"},
		"RAM twice":          {ram().add(uint64(flagEOS), 0x7e, uint32(2), 0x01, uint32(2), 3, "ram", uint32(0), uint32(4)), ErrFormat, "twice"},
		"other section":      {ram().add(uint64(flagEOS), 0x7e, uint32(2), 0x02, uint32(9)), ErrFormat, "section 9"},
		"after the end":      {ram().add(uint64(flagEOS), 0x7e, uint32(2), 0x03, uint32(2), uint64(flagEOS), 0x7e, uint32(2), 0x02, uint32(2)), ErrFormat, "not open"},
		"wrong footer":       {ram().add(uint64(flagEOS), 0x7e, uint32(3)), ErrFormat, "footer"},
		"page before list":   {start().add(0x01, uint32(2), 3, "ram", uint32(0), uint32(4), uint64(flagZero), 1, "a", 0), ErrFormat, "before"},
		"end before list":    {start().add(0x01, uint32(2), 3, "ram", uint32(0), uint32(4), uint64(flagEOS)), ErrFormat, "ends"},
		"no RAM":             {start().add(0x00), ErrFormat, "type 0x0"},
	} {
		_, err := Decode(t.Context(), bytes.NewReader(c.in.b), &memory{})
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.words)
		}
	}
}

// TestHarmlessParts reads what a stream may have beside RAM.
func TestHarmlessParts(t *testing.T) {
	p := start().add(0x05, 18, "configuration/uuid", uint32(1), make([]byte, 16)).
		add(0x05, 26, "configuration/capabilities", uint32(1), uint32(0)).
		add(0x05, 30, "configuration/target-page-bits", uint32(1), uint32(12)).
		add(0x08, uint16(1), uint16(0), 0x08, uint16(2), uint16(4), uint32(7)).
		add(0x01, uint32(2), 3, "ram", uint32(0), uint32(4), uint64(PageBytes|flagMemSize), 1, "a", uint64(PageBytes), uint64(flagEOS), 0x7e, uint32(2)).
		add(0x08, uint16(11), uint16(0)).
		add(0x03, uint32(2), uint64(flagZero), 1, "a", 7, uint64(flagEOS), 0x7e, uint32(2), testTail)
	m := &memory{}
	tail, err := Decode(t.Context(), bytes.NewReader(p.b), m)
	if err != nil || string(tail.Devices) != testTail {
		t.Fatalf("%v, %v", tail, err)
	}
	if !bytes.Equal(m.ram["a"], bytes.Repeat([]byte{7}, PageBytes)) {
		t.Error("a page of sevens is something else")
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Decode(ctx, bytes.NewReader(encoded(t, true)), &memory{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// FuzzDecode decodes anything; what decodes is encoded again and must decode to the
// same.
func FuzzDecode(f *testing.F) {
	f.Add(encoded(f, true))
	f.Add(ram().add(uint64(PageBytes|flagZero), 1, "a", 3, uint64(flagEOS), 0x7e, uint32(2)).b)
	f.Add(start().add(0x08, uint16(11), uint16(0)).b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &memory{limit: 1 << 20}
		tail, err := Decode(context.Background(), bytes.NewReader(b), m)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, errTooMuch) {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		var out bytes.Buffer
		e := NewEncoder(&out, 77, true)
		if err := e.Begin([]byte(testHead), m.blocks); err != nil {
			t.Fatal(err)
		}
		for i, blk := range m.blocks {
			for at := uint64(0); at < blk.UsedBytes; at += PageBytes {
				if err := e.Page(i, at, m.ram[blk.Name][at:at+PageBytes]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := e.End(tail.Devices); err != nil {
			t.Fatal(err)
		}
		again := &memory{}
		tail2, err := Decode(context.Background(), &out, again)
		if err != nil || !bytes.Equal(tail.Devices, tail2.Devices) || len(m.ram) > 0 && cmp.Diff(m.ram, again.ram) != "" {
			// An empty block is not written.
			for _, blk := range m.blocks {
				if blk.UsedBytes == 0 {
					return
				}
			}
			t.Fatalf("decodes to something else: %v", err)
		}
	})
}

package vmstate

import (
	"encoding/binary"
	"fmt"
)

// maxSections bounds the listing: QEMU has one section per device, a few
// hundred on the largest machines.
const maxSections = 1 << 14

// Section is one device's part of a stream.
type Section struct {
	ID       uint32 // chosen by the writer, different for every section
	Name     string // "timer", "cpu", "0000:00:03.0/virtio-net"
	Instance uint32 // distinguishes sections of one name (vCPUs)
	Version  uint32 // of the section's layout
	Offset   int    // of the payload, from the start of the input
	Bytes    int    // of the payload, header and footer excluded
}

// Listing is what Parse found.
type Listing struct {
	Machine     string // of the configuration section; empty when there is none
	Sections    []Section
	Description []byte // of the description section; aliases the input; nil when there is none
}

// Parse lists the sections of a device state or a migration stream. Sections
// end where their footer is followed by something that can follow a footer; a
// stream without footers (machine types before 2.4) cannot be listed and gives
// an ErrFormat.
func Parse(b []byte) (*Listing, error) { return parse(b, nil) }

// parse is Parse with what is known of the sections to come; an expectation of nil
// is none.
func parse(b []byte, expected []described) (*Listing, error) {
	rest, err := checkHeader(b)
	if err != nil {
		return nil, err
	}
	w := walk{expected: expected, seen: map[uint32]bool{}}
	var l Listing
	if rest[0] == typeConfig {
		if l.Machine, rest, err = parseConfig(rest); err != nil {
			return nil, err
		}
	}
	for {
		if len(rest) == 0 {
			return nil, fmt.Errorf("%w: no end mark after %d sections", ErrTruncated, len(l.Sections))
		}
		switch rest[0] {
		case typeEOF:
			l.Description, err = parseDescription(rest[1:])
			if err != nil {
				return nil, err
			}
			return &l, nil
		case typeFull, typeStart:
		default:
			return nil, fmt.Errorf("%w: section type %#x at offset %d", ErrFormat, rest[0], len(b)-len(rest))
		}
		if len(l.Sections) == maxSections {
			return nil, fmt.Errorf("%w: more than %d sections", ErrFormat, maxSections)
		}
		s, n, ok := parseSectionHeader(rest)
		if !ok || !w.fits(s) {
			return nil, fmt.Errorf("%w: section header at offset %d", ErrFormat, len(b)-len(rest))
		}
		rest = rest[n:]
		s.Offset = len(b) - len(rest)
		w.seen[s.ID] = true
		w.at++
		if s.Bytes, ok = w.findFooter(rest, s.ID); !ok {
			return nil, fmt.Errorf("%w: section %q (%d) has no footer", ErrTruncated, s.Name, s.ID)
		}
		rest = rest[s.Bytes+footerBytes:]
		l.Sections = append(l.Sections, s)
	}
}

// parseSectionHeader reads type, id, name, instance and version; n is their size.
func parseSectionHeader(b []byte) (s Section, n int, ok bool) {
	const fixed = 1 + 4 + 1
	if len(b) < fixed || b[0] != typeFull && b[0] != typeStart {
		return s, 0, false
	}
	name := int(b[5])
	n = fixed + name + 8
	if name == 0 || name > maxNameBytes || len(b) < n {
		return s, 0, false
	}
	for _, c := range b[fixed : fixed+name] {
		if c < 0x20 || c > 0x7e {
			return s, 0, false
		}
	}
	s.ID = binary.BigEndian.Uint32(b[1:])
	s.Name = string(b[fixed : fixed+name])
	s.Instance = binary.BigEndian.Uint32(b[fixed+name:])
	s.Version = binary.BigEndian.Uint32(b[fixed+name+4:])
	return s, n, true
}

// walk is how far a listing got.
type walk struct {
	expected []described
	at       int             // sections so far
	seen     map[uint32]bool // their ids
}

// fits says whether a section can come now: its number is new, and it is the one
// that is expected. (Numbers do not rise everywhere: buses are saved before what was
// made earlier.)
func (w *walk) fits(s Section) bool {
	if w.seen[s.ID] {
		return false
	}
	return w.expected == nil || w.at < len(w.expected) && w.expected[w.at] == described{s.Name, s.Instance}
}

// findFooter returns the payload's size: the distance to the first footer of
// this section behind which the stream goes on in a way it can.
func (w *walk) findFooter(b []byte, id uint32) (int, bool) {
	var want [footerBytes]byte
	want[0] = typeFooter
	binary.BigEndian.PutUint32(want[1:], id)
	for i := 0; i+footerBytes < len(b); i++ {
		if b[i] != typeFooter || [footerBytes]byte(b[i:i+footerBytes]) != want {
			continue
		}
		next := b[i+footerBytes:]
		switch next[0] {
		case typeEOF:
			// Payloads are full of zeros: only the real end stops here.
			if w.expected != nil && w.at < len(w.expected) {
				continue
			}
			if len(next) == 1 || next[1] == typeVMDesc && isDescription(next[1:]) {
				return i, true
			}
		case typeFull, typeStart:
			if s, _, ok := parseSectionHeader(next); ok && w.fits(s) {
				return i, true
			}
		}
	}
	return 0, false
}

func isDescription(b []byte) bool {
	d, err := parseDescription(b)
	return err == nil && d != nil
}

// parseDescription reads the description section that fills b; an empty b is a
// stream without one.
func parseDescription(b []byte) ([]byte, error) {
	if len(b) == 0 {
		return nil, nil
	}
	if b[0] != typeVMDesc {
		return nil, fmt.Errorf("%w: %d bytes after the end mark", ErrFormat, len(b))
	}
	if len(b) < 5 {
		return nil, fmt.Errorf("%w: inside the description", ErrTruncated)
	}
	n := binary.BigEndian.Uint32(b[1:])
	if uint64(n) != uint64(len(b)-5) {
		return nil, fmt.Errorf("%w: description of %d bytes where %d follow", ErrFormat, n, len(b)-5)
	}
	return b[5:], nil
}

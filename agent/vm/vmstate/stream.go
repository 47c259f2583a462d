package vmstate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Layout of QEMU's migration stream (migration/savevm.c, version 3).
const (
	magic       = 0x5145564d // "QEVM"
	version     = 3
	headerBytes = 8

	typeEOF     = 0x00
	typeStart   = 0x01
	typeFull    = 0x04
	typeVMDesc  = 0x06
	typeConfig  = 0x07
	typeFooter  = 0x7e
	footerBytes = 5 // the type and the section's id, big endian

	maxNameBytes    = 255 // a one-byte length precedes every section's name
	maxMachineBytes = 255 // no machine type comes near; bounds the decoder
)

// vmDescription is what stands in the description section: QEMU reads it to the
// end and ignores it, tools that dump streams want JSON.
const vmDescription = "{}"

// ErrFormat is wrapped by every complaint about the input's content.
var ErrFormat = errors.New("not a QEMU device state")

// ErrTruncated says that the input begins rightly and stops too early.
var ErrTruncated = fmt.Errorf("%w: it ends too early", ErrFormat)

// Stream returns the migration stream for a device state file. machineType is
// the versioned machine type that the state was saved on and will be loaded on
// ("pc-i440fx-7.2"); the file must be whole, from header to end mark.
func Stream(machineType string, deviceState []byte) ([]byte, error) {
	head, tail, err := Split(machineType, deviceState)
	if err != nil {
		return nil, err
	}
	return append(head, tail...), nil
}

// Split returns the same stream in two pieces, between which RAM may stand: header
// and configuration; device sections, end mark and description.
func Split(machineType string, deviceState []byte) (head, tail []byte, err error) {
	if machineType == "" || len(machineType) > maxMachineBytes {
		return nil, nil, fmt.Errorf("machine type %.40q has %d bytes, want 1 to %d", machineType, len(machineType), maxMachineBytes)
	}
	modern := modernFormat(machineType)
	body, err := checkHeader(deviceState)
	if err != nil {
		return nil, nil, err
	}
	if err := checkEnd(body, modern); err != nil {
		return nil, nil, err
	}
	head = append(make([]byte, 0, len(deviceState)+len(machineType)+len(vmDescription)+16), deviceState[:headerBytes]...)
	if body[0] == typeConfig {
		// A QEMU that writes the section itself: keep it if it names our machine.
		name, rest, err := parseConfig(body)
		if err != nil {
			return nil, nil, err
		}
		if name != machineType {
			return nil, nil, fmt.Errorf("%w: it was saved on machine type %q, not %q", ErrFormat, name, machineType)
		}
		head = append(head, body[:len(body)-len(rest)]...)
		body = rest
	} else if modern {
		head = append(head, typeConfig)
		head = binary.BigEndian.AppendUint32(head, uint32(len(machineType)))
		head = append(head, machineType...)
	}
	tail = append(make([]byte, 0, len(body)+len(vmDescription)+8), body...)
	tail = append(tail, typeVMDesc)
	tail = binary.BigEndian.AppendUint32(tail, uint32(len(vmDescription)))
	return head, append(tail, vmDescription...), nil
}

// HasFooters says whether streams of a machine type end their sections with
// footers; streams of 2.3 and older do not.
func HasFooters(machineType string) bool { return modernFormat(machineType) }

// FreeID is a section id that no section of a device state has: the place of RAM,
// which the writer counted but left out.
func FreeID(deviceState []byte) (uint32, error) {
	l, err := Parse(deviceState)
	if err != nil {
		return 0, err
	}
	used := make(map[uint32]bool, len(l.Sections))
	for _, s := range l.Sections {
		used[s.ID] = true
	}
	for id := uint32(1); ; id++ { // ends: there are at most maxSections
		if !used[id] {
			return id, nil
		}
	}
}

// checkHeader verifies magic and version and returns what follows them.
func checkHeader(b []byte) ([]byte, error) {
	if len(b) < headerBytes {
		return nil, fmt.Errorf("%w: %d bytes", ErrTruncated, len(b))
	}
	if m := binary.BigEndian.Uint32(b); m != magic {
		return nil, fmt.Errorf("%w: magic %#x, want %#x", ErrFormat, m, uint32(magic))
	}
	if v := binary.BigEndian.Uint32(b[4:]); v != version {
		return nil, fmt.Errorf("%w: version %d, this program reads %d", ErrFormat, v, version)
	}
	body := b[headerBytes:]
	if len(body) == 0 {
		return nil, fmt.Errorf("%w: no section follows the header", ErrTruncated)
	}
	return body, nil
}

// checkEnd verifies that a device state's body starts with a section and stops
// with the end mark behind a footer: what a writer that was interrupted, or a
// file cut short, lacks.
func checkEnd(body []byte, footers bool) error {
	switch body[0] {
	case typeFull, typeStart, typeConfig:
	default:
		return fmt.Errorf("%w: section type %#x at its start", ErrFormat, body[0])
	}
	if body[len(body)-1] != typeEOF {
		return fmt.Errorf("%w: no end mark", ErrTruncated)
	}
	if !footers {
		return nil
	}
	if len(body) < footerBytes+1 || body[len(body)-1-footerBytes] != typeFooter {
		return fmt.Errorf("%w: the last section has no footer", ErrTruncated)
	}
	return nil
}

// parseConfig reads a configuration section at the start of b.
func parseConfig(b []byte) (machine string, rest []byte, err error) {
	if len(b) < 5 {
		return "", nil, fmt.Errorf("%w: inside the configuration section", ErrTruncated)
	}
	n := binary.BigEndian.Uint32(b[1:])
	if n == 0 || n > maxMachineBytes {
		return "", nil, fmt.Errorf("%w: machine type of %d bytes", ErrFormat, n)
	}
	b = b[5:]
	if uint32(len(b)) < n {
		return "", nil, fmt.Errorf("%w: inside the configuration section", ErrTruncated)
	}
	return string(b[:n]), b[n:], nil
}

// modernFormat says whether a machine type's streams carry a configuration
// section and section footers. QEMU's hw_compat_2_3 turns both off for 2.3 and
// older; a name without a version ("none", "microvm") belongs to no versioned
// series and gets today's format. The description is always written: the one
// machine type that expects none (2.2) stops reading before it.
func modernFormat(machine string) bool {
	i := strings.LastIndexByte(machine, '-')
	if i < 0 {
		return true
	}
	maj, min, ok := strings.Cut(machine[i+1:], ".")
	if !ok {
		return true
	}
	min, _, _ = strings.Cut(min, ".")
	a, errA := strconv.Atoi(maj)
	b, errB := strconv.Atoi(min)
	if errA != nil || errB != nil {
		return true
	}
	return a > 2 || a == 2 && b >= 4
}

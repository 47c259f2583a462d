package libvirt

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Programs and procedures, as numbered by libvirt's protocol files.
const (
	programRemote = 0x20008086
	programQEMU   = 0x20008087

	procOpen            = 1
	procClose           = 2
	procDomainXML       = 14
	procDomainAutostart = 15
	procDomainByUUID    = 24
	procAuthList        = 66
	procAuthPolkit      = 70
	procLibVersion      = 157
	procDomainState     = 212

	procMonitor          = 1
	procMonitorRegister  = 4
	procMonitorEvent     = 6
	procMonitorWithFiles = 7
)

// Kinds and statuses of messages.
const (
	kindCall        = 0
	kindReply       = 1
	kindMessage     = 2
	kindCallWithFDs = 4

	statusOK    = 0
	statusError = 1
)

const (
	headBytes = 28 // with the length in front
	version   = 1  // of both programs

	// maxMessageBytes is libvirt's own limit with some room.
	maxMessageBytes = 34 << 20
	maxStringBytes  = 32 << 20
	maxNameBytes    = 64 << 10
)

// head is what every message begins with.
type head struct {
	bytes                            uint32 // of the message, itself included
	program, procedure, kind, serial uint32
	status                           uint32
}

func (h *head) append(b []byte) []byte {
	for _, v := range [...]uint32{h.bytes, h.program, version, h.procedure, h.kind, h.serial, h.status} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

// decodeHead reads a head and refuses sizes that cannot be.
func decodeHead(b []byte) (h head, err error) {
	if len(b) < headBytes {
		return h, fmt.Errorf("%w: a message of %d bytes", ErrProtocol, len(b))
	}
	at := func(i int) uint32 { return binary.BigEndian.Uint32(b[4*i:]) }
	h = head{at(0), at(1), at(3), at(4), at(5), at(6)}
	if h.bytes < headBytes || h.bytes > maxMessageBytes {
		return h, fmt.Errorf("%w: a message of %d bytes", ErrProtocol, h.bytes)
	}
	return h, nil
}

// encoder writes XDR: big-endian words, and bytes padded to words.
type encoder struct{ b []byte }

func (e *encoder) uint(v uint32) { e.b = binary.BigEndian.AppendUint32(e.b, v) }

func (e *encoder) opaque(b []byte) {
	e.b = append(e.b, b...)
	e.b = append(e.b, make([]byte, -len(b)&3)...)
}

func (e *encoder) string(s string) {
	e.uint(uint32(len(s)))
	e.opaque([]byte(s))
}

// present is what stands before a value that might be missing.
func (e *encoder) present(yes bool) {
	v := uint32(0)
	if yes {
		v = 1
	}
	e.uint(v)
}

func (e *encoder) domain(d Domain) {
	e.string(d.Name)
	e.opaque(d.UUID[:])
	e.uint(uint32(d.ID))
}

var errShort = errors.New("it ends too early")

// decoder reads XDR; the first error sticks.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) take(n int) []byte {
	if d.err == nil && (n < 0 || n > len(d.b)) {
		d.err = errShort
	}
	if d.err != nil {
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) uint() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) int() int32 { return int32(d.uint()) }

func (d *decoder) hyper() int64 {
	high := d.uint()
	return int64(uint64(high)<<32 | uint64(d.uint()))
}

func (d *decoder) string(limit int) string {
	n := d.uint()
	if d.err == nil && n > uint32(limit) {
		d.err = fmt.Errorf("a string of %d bytes", n)
	}
	s := string(d.take(int(n)))
	d.take(-int(n) & 3)
	return s
}

// optional reads a string that may be missing.
func (d *decoder) optional(limit int) string {
	if d.uint() == 0 {
		return ""
	}
	return d.string(limit)
}

func (d *decoder) domain() (dom Domain) {
	dom.Name = d.string(maxNameBytes)
	copy(dom.UUID[:], d.take(len(dom.UUID)))
	dom.ID = d.int()
	return dom
}

// failed is d.err as a breach of the protocol.
func (d *decoder) failed(what string) error {
	if d.err == nil {
		return nil
	}
	return fmt.Errorf("%w: %s: %w", ErrProtocol, what, d.err)
}

// decodeError reads the payload of a reply with statusError: code, origin,
// message (optional) and level; what follows is not needed.
func decodeError(b []byte) error {
	d := decoder{b: b}
	e := &Error{Code: d.int()}
	d.uint()
	e.Message = d.optional(maxStringBytes)
	if err := d.failed("error reply"); err != nil {
		return err
	}
	return e
}

// decodeEvent reads a monitor event.
func decodeEvent(b []byte) (Event, error) {
	d := decoder{b: b}
	d.uint() // the registration; there is one a connection
	e := Event{Domain: d.domain(), Name: d.string(maxNameBytes)}
	e.Seconds, e.Micros = d.hyper(), d.uint()
	e.Details = d.optional(maxStringBytes)
	return e, d.failed("event")
}

package qmp

import (
	"bytes"
	"fmt"
)

const (
	// maxMessageBytes bounds one message from QEMU. Replies of several MiB are
	// real (query-named-block-nodes on long chains, HMP dumps).
	maxMessageBytes = 128 << 20
	minReadBytes    = 16 << 10 // free space offered to each read(2)
	keepBytes       = 1 << 20  // a buffer grown beyond this is let go when empty
)

// splitter cuts a byte stream into JSON objects by counting brackets outside of
// strings, whatever the line breaks (-qmp-pretty has many). Every byte is looked
// at once, however the stream was chopped up. It does not validate.
type splitter struct {
	buf   []byte
	start int // of the message under way
	scan  int // first byte not looked at
	end   int // of what was read

	depth   int
	inStr   bool
	escaped bool
	max     int
}

func newSplitter() *splitter {
	return &splitter{buf: make([]byte, 64<<10), max: maxMessageBytes}
}

// space returns room to read into; fill says how much of it was used.
func (s *splitter) space() ([]byte, error) {
	if s.start == s.end {
		s.start, s.scan, s.end = 0, 0, 0
		if len(s.buf) > keepBytes {
			s.buf = make([]byte, 64<<10)
		}
	}
	if len(s.buf)-s.end < minReadBytes && s.start > 0 {
		copy(s.buf, s.buf[s.start:s.end])
		s.scan -= s.start
		s.end -= s.start
		s.start = 0
	}
	if len(s.buf)-s.end < minReadBytes {
		if s.end >= s.max {
			return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, s.max)
		}
		grown := make([]byte, min(2*len(s.buf), s.max+2*minReadBytes))
		copy(grown, s.buf[:s.end])
		s.buf = grown
	}
	return s.buf[s.end:], nil
}

func (s *splitter) fill(n int) { s.end += n }

// next returns the next whole message, valid until the next call of space, or
// nil if there is none yet.
func (s *splitter) next() ([]byte, error) {
	for s.scan < s.end {
		if s.inStr {
			if s.escaped {
				s.escaped = false
				s.scan++
				continue
			}
			// Long strings (HMP output) at the speed of memory.
			rest := s.buf[s.scan:s.end]
			i := bytes.IndexByte(rest, '"')
			if i < 0 {
				i = len(rest)
			}
			if j := bytes.IndexByte(rest[:i], '\\'); j >= 0 {
				s.escaped = true
				s.scan += j + 1
				continue
			}
			s.scan += i
			if i < len(rest) {
				s.inStr = false
				s.scan++
			}
			continue
		}
		c := s.buf[s.scan]
		s.scan++
		switch c {
		case '{', '[':
			if s.depth == 0 {
				if c == '[' {
					return nil, s.garbage(c)
				}
				s.start = s.scan - 1
			}
			s.depth++
		case '}', ']':
			s.depth--
			if s.depth < 0 {
				return nil, s.garbage(c)
			}
			if s.depth == 0 {
				msg := s.buf[s.start:s.scan]
				s.start = s.scan
				return msg, nil
			}
		case '"':
			if s.depth == 0 {
				return nil, s.garbage(c)
			}
			s.inStr = true
		case ' ', '\t', '\r', '\n':
			if s.depth == 0 {
				s.start = s.scan
			}
		default:
			if s.depth == 0 {
				return nil, s.garbage(c)
			}
		}
	}
	return nil, nil
}

func (s *splitter) garbage(c byte) error {
	s.scan--
	text := s.buf[s.scan:min(s.end, s.scan+40)]
	return fmt.Errorf("%w: %q (first byte %#x)", ErrProtocol, text, c)
}

// message is the outermost level of a QMP message; all slices alias it.
type message struct {
	id, ret, err, event, data, timestamp, greeting []byte
}

// parseMessage finds the members of the outermost object of msg, which the
// splitter cut. It reports whether the object is well-formed at this level; the
// values are validated by whoever decodes them.
func parseMessage(msg []byte) (m message, ok bool) {
	i := skipSpace(msg, 1)
	if i < len(msg) && msg[i] == '}' {
		return m, true
	}
	for {
		key, next := value(msg, i)
		if len(key) < 2 || key[0] != '"' {
			return m, false
		}
		i = skipSpace(msg, next)
		if i >= len(msg) || msg[i] != ':' {
			return m, false
		}
		val, next := value(msg, skipSpace(msg, i+1))
		if len(val) == 0 {
			return m, false
		}
		switch string(key[1 : len(key)-1]) {
		case "id":
			m.id = val
		case "return":
			m.ret = val
		case "error":
			m.err = val
		case "event":
			m.event = val
		case "data":
			m.data = val
		case "timestamp":
			m.timestamp = val
		case "QMP":
			m.greeting = val
		}
		i = skipSpace(msg, next)
		if i >= len(msg) {
			return m, false
		}
		if msg[i] == '}' {
			return m, i == len(msg)-1
		}
		if msg[i] != ',' {
			return m, false
		}
		i = skipSpace(msg, i+1)
	}
}

func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\r' || b[i] == '\n') {
		i++
	}
	return i
}

// value returns the JSON value that starts at b[i], and the index after it.
func value(b []byte, i int) ([]byte, int) {
	begin, depth := i, 0
	for i < len(b) {
		switch b[i] {
		case '"':
			for i++; i < len(b) && b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if i >= len(b) {
				return nil, i
			}
			if depth == 0 {
				return b[begin : i+1], i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return b[begin:i], i // a scalar ended by its parent
			}
			if depth--; depth == 0 {
				return b[begin : i+1], i + 1
			}
		case ',', ':', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return b[begin:i], i
			}
		}
		i++
	}
	return nil, i
}

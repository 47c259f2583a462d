package vmtest

// piece is a JSON object, or bytes between objects.
type piece struct {
	data    []byte
	message bool
	files   []int // descriptors that arrived within it
}

// splitter cuts a byte stream into JSON objects without changing a byte. QMP
// clients may send 0xFF to make QEMU forget half a command; here as there it
// ends whatever was begun.
type splitter struct {
	object   []byte // the object begun so far
	depth    int
	inString bool
	escaped  bool
	files    []int // arrived since the last message was complete; its owner is the next piece
}

// maxObject bounds the memory an endless object may take; what exceeds it is
// passed on in pieces that no rule sees.
const maxObject = 16 << 20

func (s *splitter) feed(data []byte) (out []piece) {
	var between []byte
	flush := func() {
		if len(between) > 0 {
			out = append(out, piece{data: between})
			between = nil
		}
	}
	abandon := func() { // what was begun becomes bytes between objects
		between = append(s.object, between...)
		s.object, s.depth, s.inString, s.escaped = nil, 0, false, false
	}
	for _, b := range data {
		if b == 0xff || len(s.object) >= maxObject {
			abandon()
		}
		if s.depth == 0 && b != '{' {
			between = append(between, b)
			continue
		}
		if s.depth == 0 {
			flush()
		}
		s.object = append(s.object, b)
		switch {
		case s.escaped:
			s.escaped = false
		case s.inString && b == '\\':
			s.escaped = true
		case b == '"':
			s.inString = !s.inString
		case s.inString:
		case b == '{':
			s.depth++
		case b == '}':
			if s.depth--; s.depth == 0 {
				out = append(out, piece{data: s.object, message: true, files: s.files})
				s.object, s.files = nil, nil
			}
		}
	}
	flush()
	return out
}

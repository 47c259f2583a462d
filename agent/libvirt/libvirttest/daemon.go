package libvirttest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/libvirt"
)

// Daemon is a daemon with one domain.
type Daemon struct {
	Domain  libvirt.Domain
	Version uint64 // 9000000 if 0
	XML     func(flags uint32) string
	// Autostart is 1 if the domain has it.
	Autostart uint32
	// State is the domain's, Running if nil.
	State func() (state, reason int32)
	// Monitor answers a monitor command; the file is the daemon's to close.
	Monitor func(command string, file *os.File) (reply string, failure error)

	listener net.Listener
	done     chan struct{}

	mu   sync.Mutex // orders what is written, and guards conn
	conn *net.UnixConn
}

// Start serves; the returned end is the client's.
func (d *Daemon) Start() (*net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ends := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "libvirt")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, err
		}
		ends[i] = c.(*net.UnixConn)
	}
	d.conn, d.done = ends[0], make(chan struct{})
	go func() {
		defer close(d.done)
		_ = d.serve() // ends when the client does
	}()
	return ends[1], nil
}

// Listen serves at a path, one client after the other.
func (d *Daemon) Listen(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	d.listener, d.done = l, make(chan struct{})
	go func() {
		defer close(d.done)
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			d.mu.Lock()
			d.conn = c.(*net.UnixConn)
			d.mu.Unlock()
			_ = d.serve() // ends when the client does
			c.Close()
		}
	}()
	return nil
}

// Close ends the connection from the daemon's side.
func (d *Daemon) Close() {
	if d.listener != nil {
		d.listener.Close()
	}
	d.mu.Lock()
	if d.conn != nil {
		d.conn.Close()
	}
	d.mu.Unlock()
	<-d.done
}

func (d *Daemon) serve() error {
	for {
		var h [7]uint32 // length, program, version, procedure, kind, serial, status
		if err := binary.Read(d.conn, binary.BigEndian, &h); err != nil {
			return err
		}
		body := make([]byte, h[0]-28)
		if _, err := io.ReadFull(d.conn, body); err != nil {
			return err
		}
		var file *os.File
		if h[4] == 4 {
			body = body[4:]
			var err error
			if file, err = d.receive(); err != nil {
				return err
			}
		}
		reply, failure := d.answer(h[1], h[3], body, file)
		status := uint32(0)
		if failure != nil {
			status, reply = 1, encodeFailure(failure)
		}
		if err := d.send(h[1], h[3], 1, h[5], status, reply); err != nil {
			return err
		}
	}
}

func (d *Daemon) receive() (*os.File, error) {
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := d.conn.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, errors.Join(err, errors.New("no descriptor"))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(err, errors.New("no descriptor"))
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "passed"), nil
}

func (d *Daemon) send(program, procedure, kind, serial, status uint32, body []byte) error {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.BigEndian, [7]uint32{uint32(28 + len(body)), program, 1, procedure, kind, serial, status}) // to memory
	b.Write(body)
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.conn.Write(b.Bytes())
	return err
}

// answer knows the procedures by their numbers in libvirt's protocol files.
func (d *Daemon) answer(program, procedure uint32, body []byte, file *os.File) ([]byte, error) {
	var b bytes.Buffer
	word := func(vs ...uint32) {
		for _, v := range vs {
			_ = binary.Write(&b, binary.BigEndian, v) // to memory
		}
	}
	word64 := func(v uint64) { word(uint32(v>>32), uint32(v)) }
	if program == 0x20008087 {
		switch procedure {
		case 1, 7:
			r := bytes.NewReader(body)
			text(r)
			skip(r, 16+4)
			reply, failure := d.Monitor(text(r), file)
			putText(&b, reply)
			return b.Bytes(), failure
		case 4:
			word(1)
			return b.Bytes(), nil
		}
	}
	switch procedure {
	case 1, 2:
	case 66:
		word(1, 0)
	case 157:
		v := d.Version
		if v == 0 {
			v = 9000000
		}
		word64(v)
	case 24:
		if !bytes.Equal(body, d.Domain.UUID[:]) {
			return nil, &libvirt.Error{Code: 42, Message: "Domain not found"}
		}
		putDomain(&b, d.Domain)
	case 14:
		r := bytes.NewReader(body)
		text(r)
		skip(r, 16+4)
		var flags uint32
		_ = binary.Read(r, binary.BigEndian, &flags) // zero if it is not there
		putText(&b, d.XML(flags))
	case 15:
		word(d.Autostart)
	case 212:
		state, reason := int32(libvirt.Running), int32(0)
		if d.State != nil {
			state, reason = d.State()
		}
		word(uint32(state), uint32(reason))
	default:
		return nil, &libvirt.Error{Code: 39, Message: "unknown procedure"}
	}
	return b.Bytes(), nil
}

// Event sends a monitor event.
func (d *Daemon) Event(name, details string, seconds int64, micros uint32) error {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.BigEndian, uint32(1)) // to memory, as below
	putDomain(&b, d.Domain)
	putText(&b, name)
	_ = binary.Write(&b, binary.BigEndian, seconds)
	_ = binary.Write(&b, binary.BigEndian, micros)
	if details == "" {
		_ = binary.Write(&b, binary.BigEndian, uint32(0))
	} else {
		_ = binary.Write(&b, binary.BigEndian, uint32(1))
		putText(&b, details)
	}
	return d.send(0x20008087, 6, 2, 0, 0, b.Bytes())
}

func encodeFailure(err error) []byte {
	var b bytes.Buffer
	code := uint32(1)
	if e, ok := errors.AsType[*libvirt.Error](err); ok {
		code = uint32(e.Code)
		err = errors.New(e.Message)
	}
	_ = binary.Write(&b, binary.BigEndian, [3]uint32{code, 10, 1}) // to memory
	putText(&b, err.Error())
	_ = binary.Write(&b, binary.BigEndian, [6]uint32{2})
	return b.Bytes()
}

func putDomain(b *bytes.Buffer, d libvirt.Domain) {
	putText(b, d.Name)
	b.Write(d.UUID[:])
	_ = binary.Write(b, binary.BigEndian, d.ID) // to memory
}

func putText(b *bytes.Buffer, s string) {
	_ = binary.Write(b, binary.BigEndian, uint32(len(s))) // to memory
	b.WriteString(s)
	b.Write(make([]byte, (4-len(s)%4)%4))
}

// text reads a string; a test's own client sends whole ones.
func text(r *bytes.Reader) string {
	var n uint32
	_ = binary.Read(r, binary.BigEndian, &n)
	b := make([]byte, min(n, uint32(r.Len())))
	_, _ = io.ReadFull(r, b)
	skip(r, int64((4-n%4)%4))
	return string(b)
}

func skip(r *bytes.Reader, n int64) { _, _ = r.Seek(n, io.SeekCurrent) }

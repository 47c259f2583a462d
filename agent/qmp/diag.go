package qmp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/sock_diag.h and unix_diag.h.
const (
	sockDiagByFamily = 20
	udiagShowPeer    = 0x4
	unixDiagPeer     = 2
	unixDiagMsgBytes = 16
)

// unixPeer asks the kernel (sock_diag) which socket is at the other end of a
// connected unix socket. Both are inode numbers; the peer's is 0 until it was
// accepted. The socket must be of the caller's network namespace.
func unixPeer(inode uint64) (uint64, error) {
	if inode == 0 || inode > 1<<32-1 {
		return 0, fmt.Errorf("socket inode %d: %w", inode, errors.ErrUnsupported)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, fmt.Errorf("sock_diag: %w", err)
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return 0, fmt.Errorf("sock_diag: %w", err)
	}
	ne := binary.NativeEndian
	// struct nlmsghdr, struct unix_diag_req
	req := make([]byte, unix.SizeofNlMsghdr+24)
	ne.PutUint32(req[0:], uint32(len(req)))
	ne.PutUint16(req[4:], sockDiagByFamily)
	ne.PutUint16(req[6:], unix.NLM_F_REQUEST)
	ne.PutUint32(req[8:], 1) // sequence
	body := req[unix.SizeofNlMsghdr:]
	body[0] = unix.AF_UNIX
	ne.PutUint32(body[4:], 0xffffffff) // any state
	ne.PutUint32(body[8:], uint32(inode))
	ne.PutUint32(body[12:], udiagShowPeer)
	ne.PutUint32(body[16:], 0xffffffff) // no cookie
	ne.PutUint32(body[20:], 0xffffffff)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("sock_diag: %w", err)
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return 0, fmt.Errorf("sock_diag: %w", err)
	}
	return parseUnixPeer(buf[:n])
}

func parseUnixPeer(b []byte) (uint64, error) {
	ne := binary.NativeEndian
	if len(b) < unix.SizeofNlMsghdr {
		return 0, errors.New("sock_diag: short answer")
	}
	if size := int(ne.Uint32(b)); size < len(b) {
		b = b[:max(size, unix.SizeofNlMsghdr)]
	}
	kind := ne.Uint16(b[4:])
	b = b[unix.SizeofNlMsghdr:]
	if kind == unix.NLMSG_ERROR && len(b) >= 4 {
		return 0, fmt.Errorf("sock_diag: %w", unix.Errno(-int32(ne.Uint32(b))))
	}
	if kind != sockDiagByFamily || len(b) < unixDiagMsgBytes {
		return 0, fmt.Errorf("sock_diag: answer of type %d, %d bytes", kind, len(b))
	}
	for b = b[unixDiagMsgBytes:]; len(b) >= unix.SizeofRtAttr; {
		size, typ := int(ne.Uint16(b)), ne.Uint16(b[2:])
		if size < unix.SizeofRtAttr || size > len(b) {
			break
		}
		if typ == unixDiagPeer && size >= unix.SizeofRtAttr+4 {
			return uint64(ne.Uint32(b[unix.SizeofRtAttr:])), nil
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return 0, nil // not connected, or not accepted yet
}

package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

// serve has a daemon answer until the test ends, and returns its listeners.
func serve(t *testing.T, change func(*Config)) *servers {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil { // or nobody else comes as far as the sockets
		t.Fatal(err)
	}
	c := Standard()
	c.Socket, c.ReadSocket, c.StateDir = filepath.Join(dir, "s", "d.sock"), filepath.Join(dir, "s", "r.sock"), filepath.Join(dir, "state")
	change(&c)
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	d, err := New(c, Deps{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s, err := d.listen(ctx)
	if err != nil {
		cancel()
		t.Fatal(errors.Join(err, d.Close()))
	}
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-ended, s.close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// pool trusts the authority.
func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// sign makes a certificate of 127.0.0.1 for both sides, which ends so long from now.
func (a *authority) sign(t *testing.T, lasts time.Duration) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lasts)}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// write puts a certificate and its key into files.
func write(t *testing.T, dir string, c tls.Certificate) (cert, key string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// TestMutualTLS: over TCP only those are served who have a certificate in force of the
// right authority, and they too serve themselves only by the daemon that they mean.
func TestMutualTLS(t *testing.T) {
	ours, other := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	cert, key := write(t, dir, ours.sign(t, time.Hour))
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, ours.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	s := serve(t, func(c *Config) { c.TLS = TLS{Listen: "127.0.0.1:0", Cert: cert, Key: key, ClientCA: ca} })
	address := s.on[len(s.on)-1].Addr().String()
	ask := func(cfg *tls.Config) error {
		conn, err := api.DialTLS(address, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err = apipb.NewAgentClient(conn).Status(ctx, &apipb.StatusRequest{})
		return err
	}
	right := ours.sign(t, time.Hour)
	for _, c := range []struct {
		who    string
		served bool
		cfg    *tls.Config
	}{
		{"the right client", true, &tls.Config{Certificates: []tls.Certificate{right}, RootCAs: ours.pool()}},
		{"one without a certificate", false, &tls.Config{RootCAs: ours.pool()}},
		{"one of another authority", false, &tls.Config{Certificates: []tls.Certificate{other.sign(t, time.Hour)}, RootCAs: ours.pool()}},
		{"one whose certificate has expired", false, &tls.Config{Certificates: []tls.Certificate{ours.sign(t, -time.Minute)}, RootCAs: ours.pool()}},
		{"one that takes the daemon for a stranger", false, &tls.Config{Certificates: []tls.Certificate{right}, RootCAs: other.pool()}},
		{"one of an older protocol", false, &tls.Config{Certificates: []tls.Certificate{right}, RootCAs: ours.pool(), MaxVersion: tls.VersionTLS12}},
		{"the right client, again", true, &tls.Config{Certificates: []tls.Certificate{right}, RootCAs: ours.pool()}},
	} {
		if err := ask(c.cfg); (err == nil) != c.served {
			t.Errorf("%s: %v", c.who, err)
		}
	}
	plain, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := apipb.NewAgentClient(plain).Status(ctx, &apipb.StatusRequest{}); err == nil {
		t.Error("one without TLS is served")
	}
}

// Ids of Debian's base system: nobody, and two groups that have nothing to do with us.
const (
	nobody      = 65534
	daemonGroup = 1
	mailGroup   = 8
)

// connectAs connects to a socket as nobody, in one group.
func connectAs(group int, path string) (net.Conn, error) {
	type end struct {
		c   net.Conn
		err error
	}
	out := make(chan end)
	go func() {
		// These are a thread's own; it is never unlocked, and ends with the goroutine.
		runtime.LockOSThread()
		if err := errors.Join(unix.Setfsgid(group), unix.Setfsuid(nobody)); err != nil {
			out <- end{nil, err}
			return
		}
		c, err := net.DialTimeout("unix", path, 5*time.Second)
		out <- end{c, err}
	}()
	e := <-out
	return e.c, e.err
}

// client is gRPC over a connection that is there.
func client(t *testing.T, c net.Conn) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///given", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return c, nil }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// call calls any method of the service with nothing in its request.
func call(ctx context.Context, c *grpc.ClientConn, method string, stream bool) error {
	if !stream {
		return c.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	s, err := c.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	return errors.Join(s.SendMsg(&emptypb.Empty{}), s.CloseSend(), s.RecvMsg(&emptypb.Empty{}))
}

// TestSocketGroups: the group of the control socket may do everything there, that of the
// other may look and nothing else, and nobody else gets in.
func TestSocketGroups(t *testing.T) {
	s := serve(t, func(c *Config) { c.SocketGroup, c.ReadGroup = "daemon", "mail" })
	control, read := s.d.cfg.Socket, s.d.cfg.ReadSocket
	for _, c := range []struct {
		group int
		path  string
		in    bool
	}{
		{daemonGroup, control, true}, {mailGroup, control, false}, {nobody, control, false},
		{mailGroup, read, true}, {daemonGroup, read, false}, {nobody, read, false},
	} {
		conn, err := connectAs(c.group, c.path)
		if (err == nil) != c.in || err != nil && !errors.Is(err, unix.EACCES) {
			t.Errorf("group %d, %s: %v", c.group, filepath.Base(c.path), err)
		}
		if err != nil {
			continue
		}
		rpc := client(t, conn)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		looks := map[string]bool{apipb.Agent_Status_FullMethodName: true, apipb.Agent_Top_FullMethodName: true}
		one := func(name string, stream bool) {
			method := "/" + apipb.Agent_ServiceDesc.ServiceName + "/" + name
			err := call(ctx, rpc, method, stream)
			p, _ := errors.AsType[*problem.Error](api.FromStatus("call", err))
			stopped := p != nil && p.Code == problem.Refused && p.Op == "ask the daemon"
			if passes := c.path == control || looks[method]; stopped == passes {
				t.Errorf("%s by %s: %v", name, filepath.Base(c.path), err)
			}
		}
		for _, m := range apipb.Agent_ServiceDesc.Methods {
			one(m.MethodName, false)
		}
		for _, m := range apipb.Agent_ServiceDesc.Streams {
			one(m.StreamName, true)
		}
	}
	// Without a group they are root's alone.
	s = serve(t, func(*Config) {})
	for _, path := range []string{s.d.cfg.Socket, s.d.cfg.ReadSocket} {
		if _, err := connectAs(daemonGroup, path); !errors.Is(err, unix.EACCES) {
			t.Errorf("%s without a group: %v", filepath.Base(path), err)
		}
	}
}

// TestReadersAreBounded: who may only look takes no more than so many of the daemon's
// descriptors, and has the next turn when one of them goes.
func TestReadersAreBounded(t *testing.T) {
	s := serve(t, func(*Config) {})
	hello := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0, 0, 0, 4, 0, 0, 0, 0, 0) // an empty SETTINGS frame
	knock := func() net.Conn {
		c, err := net.Dial("unix", s.d.cfg.ReadSocket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() }) // again, for some
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		return c
	}
	served := func(c net.Conn, within time.Duration) error {
		if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	var in []net.Conn
	for range readConnections {
		c := knock()
		if err := served(c, time.Minute); err != nil {
			t.Fatal(err)
		}
		in = append(in, c)
	}
	late := knock()
	if err := served(late, 200*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one more: %v", err)
	}
	if err := in[0].Close(); err != nil {
		t.Fatal(err)
	}
	if err := served(late, time.Minute); err != nil {
		t.Errorf("when one has gone: %v", err)
	}
}

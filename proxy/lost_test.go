package proxy_test

import (
	"bytes"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api/client"
	"cgmanager/api/wire"
	"cgmanager/cgfs/cgtest"
)

// ending is a daemon below that knows ActFor and ends, one connection after the
// other, at a chosen moment.
type ending struct {
	path string
	mu   sync.Mutex
	read []string // the requests that it has read; guarded by mu
}

// The moments.
const (
	atOnce   = "at once"       // after the login, before any message
	unread   = "unread"        // with a request in its socket
	read     = "read"          // when it has read a request
	half     = "half answered" // after some bytes of the answer
	answered = "answered"      // not at all
)

func newEnding(t *testing.T, moments ...string) *ending {
	t.Helper()
	d := &ending{path: filepath.Join(t.TempDir(), "ending")}
	l, err := net.Listen("unix", d.path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i, m := range moments {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if i == len(moments)-1 {
				l.Close() // before the last connection ends
			}
			d.serve(t, c.(*net.UnixConn), m)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return d
}

func (d *ending) requests() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.read)
}

func (d *ending) serve(t *testing.T, c *net.UnixConn, moment string) {
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(cgtest.Patience(20 * time.Second))); err != nil {
		t.Error(err)
	}
	var in []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(in, []byte("BEGIN\r\n")) {
		n, err := c.Read(buf)
		if err != nil {
			t.Error(err)
			return
		}
		in = append(in, buf[:n]...)
	}
	in = nil
	_, _ = c.Write([]byte("DATA\r\nOK 6426d77e283b8d96d92760be6b0280a3\r\nAGREE_UNIX_FD\r\n"))
	if moment == atOnce {
		return
	}
	for serial := uint32(1); ; serial++ {
		if serial == 2 && moment == unread {
			rc, _ := c.SyscallConn()
			_ = rc.Read(func(fd uintptr) bool {
				n, _ := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
				return n > 0
			})
			return
		}
		var m wire.Message
		for {
			if n, err := wire.Size(in); err == nil && n > 0 && n <= len(in) {
				if err := m.Decode(in[:n]); err != nil {
					t.Error(err)
				}
				in = in[n:]
				break
			}
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			in = append(in, buf[:n]...)
		}
		if string(m.Member) != "ActFor" {
			d.mu.Lock()
			d.read = append(d.read, string(m.Member))
			d.mu.Unlock()
			if moment == read {
				return
			}
		}
		e := wire.NewReturn(nil, serial, m.Serial, map[string]string{"ListChildren": "as"}[string(m.Member)])
		if string(m.Member) == "ListChildren" {
			e.Strings([]string{"a"})
		}
		b, _ := e.End()
		if string(m.Member) != "ActFor" && moment == half {
			_, _ = c.Write(b[:10])
			return
		}
		_, _ = c.Write(b)
	}
}

// A request is sent again where it was surely not carried out, or changes
// nothing; never else.
func TestLost(t *testing.T) {
	for _, tc := range []struct {
		name    string
		moments []string
		changes bool
		// requests are those that the daemons have read; says is the error's
		// text, or "" for success.
		requests int
		says     string
	}{
		{"nothing sent", []string{atOnce, atOnce, answered}, true, 1, ""},
		{"not read", []string{unread, unread, answered}, true, 1, ""},
		{"read", []string{read, answered}, true, 1, "may have been carried out"},
		{"half answered", []string{half, answered}, true, 1, "may have been carried out"},
		{"read and changes nothing", []string{read, half, answered}, false, 3, ""},
		{"does not come back", []string{unread}, true, 0, "was not carried out"},
		{"read and changes nothing and does not come back", []string{read}, false, 1, "cannot be reached"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newEnding(t, tc.moments...)
			wait := cgtest.Patience(10 * time.Second)
			if tc.moments[len(tc.moments)-1] != answered {
				wait = 300 * time.Millisecond // nobody comes back
			}
			c := dial(t, start(t, d.path, wait))
			var err error
			if tc.changes {
				err = c.Delete(t.Context(), "x")
			} else {
				_, err = c.ListChildren(t.Context(), "x")
			}
			var refusal *client.Error
			switch {
			case tc.says == "" && err != nil:
				t.Error(err)
			case tc.says != "" && (!errors.As(err, &refusal) || !strings.Contains(refusal.Text, tc.says) || !strings.HasSuffix(refusal.Name, ".Error.Busy")):
				t.Errorf("got %v, want %q", err, tc.says)
			}
			if got := d.requests(); len(got) != tc.requests {
				t.Errorf("the daemons have read %q, want %d requests", got, tc.requests)
			}
		})
	}
}

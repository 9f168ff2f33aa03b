package e2e_test

import (
	"bytes"
	"encoding/hex"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// TestKernelTranscript replays the transcript of docs/PROTOCOL.md: what the
// client sends there, in one write, is answered by the very bytes there, but
// for the daemon's guid.
func TestKernelTranscript(t *testing.T) {
	harness.Require(t, "root")
	doc, err := os.ReadFile("testdata/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	var client, server []byte
	for line := range strings.Lines(string(doc)) {
		if rest, ok := strings.CutPrefix(line, "    C: "); ok {
			client = append(client, transcriptBytes(t, rest)...)
		} else if rest, ok := strings.CutPrefix(line, "    S: "); ok {
			server = append(server, transcriptBytes(t, rest)...)
		}
	}
	if len(client) == 0 || len(server) == 0 {
		t.Fatal("docs/PROTOCOL.md has no transcript")
	}

	doors(t, func(w *world) { w.transcript(client, server) })
}

func (w *world) transcript(client, server []byte) {
	t := w.T
	w.Make("box", 0, 0)
	p := w.host(0, "box")
	fd := p.Socket(unix.SOCK_STREAM)
	if err := p.Connect(fd, w.sock()); err != nil {
		t.Fatal(err)
	}
	var got []byte
	if end := bytes.Index(client, []byte("BEGIN\r\n")) + len("BEGIN\r\n"); !harness.Pipelines() {
		if err := p.Send(fd, client[:end], nil); err != nil {
			t.Fatal(err)
		}
		d, err := p.Recv(fd, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		got, client = d.Data, client[end:]
	}
	if err := p.Send(fd, client, nil); err != nil {
		t.Fatal(err)
	}
	for len(got) < len(server) {
		d, err := p.Recv(fd, 5*time.Second)
		if err != nil || len(d.Data) == 0 {
			t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, d.Data...)
	}
	guid := regexp.MustCompile(`^OK [0-9a-f]{32}\r\n`)
	if !guid.Match(got) || !bytes.Equal(guid.ReplaceAll(got, nil), guid.ReplaceAll(server, nil)) {
		t.Errorf("the daemon answered\n%q, not\n%q", got, server)
	}
	if !w.Exists(harness.Find(t, "memory"), "box/demo") {
		t.Error("the cgroup was not created")
	}
}

var transcriptToken = regexp.MustCompile(`^(?:([0-9a-f]{2})|("(?:[^"\\]|\\.)*"))(?:\s+|$)`)

// transcriptBytes reads a line of hexadecimal bytes and quoted strings, up to
// a "#".
func transcriptBytes(t *testing.T, line string) []byte {
	t.Helper()
	var bs []byte
	rest := strings.TrimSpace(line)
	for rest != "" && rest[0] != '#' {
		m := transcriptToken.FindStringSubmatch(rest)
		if m == nil {
			t.Fatalf("transcript: %q", rest)
		}
		rest = rest[len(m[0]):]
		if m[1] != "" {
			b, err := hex.DecodeString(m[1])
			if err != nil {
				t.Fatal(err)
			}
			bs = append(bs, b...)
			continue
		}
		s, err := strconv.Unquote(m[2])
		if err != nil {
			t.Fatal(err)
		}
		bs = append(bs, s...)
	}
	return bs
}

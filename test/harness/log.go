package harness

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"sync"
)

// LogEntry is a line of the daemon's log: its fields by name, those that
// every line has ("msg", "level", "time") included.
type LogEntry map[string]string

// LogSince returns what the daemon logged after the first offset bytes, and
// the offset to go on from. A line that is not complete yet waits for the next
// call.
func (d *Daemon) LogSince(offset int64) ([]LogEntry, int64) {
	d.t.Helper()
	f, err := os.Open(d.log)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	var entries []LogEntry
	var text []byte
	buf := make([]byte, 16<<10)
	for {
		n, _ := f.ReadAt(buf, offset+int64(len(text)))
		if n == 0 {
			break
		}
		text = append(text, buf[:n]...)
	}
	end := bytes.LastIndexByte(text, '\n') + 1
	for line := range strings.Lines(string(text[:end])) {
		entries = append(entries, parseLogLine(line))
	}
	return entries, offset + int64(end)
}

// parseLogLine parses key=value, where a value with anything but the plainest
// characters is quoted as in Go.
func parseLogLine(line string) LogEntry {
	e := LogEntry{}
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimLeft(line, " ") {
		key, rest, ok := strings.Cut(line, "=")
		if !ok {
			break
		}
		if quoted, err := strconv.QuotedPrefix(rest); err == nil {
			e[key], _ = strconv.Unquote(quoted)
			line = rest[len(quoted):]
			continue
		}
		e[key], line, _ = strings.Cut(rest, " ")
	}
	return e
}

// Said is what a program, or a log, has said so far.
type Said struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

// Write implements io.Writer.
func (s *Said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *Said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

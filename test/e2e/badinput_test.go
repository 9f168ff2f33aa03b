package e2e_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// siege is a daemon that one attacks while others must be served: host root,
// and users whose cgroups and accounts are their own.
type siege struct {
	*world
	fds, threads int
	// asked counts the requests of each witness that were answered.
	asked [2]atomic.Int64
	stop  chan struct{}
	wait  sync.WaitGroup
}

// patience is how long any request of an honest client may take meanwhile: a
// second, and more where the machine is busy with other things.
func patience() time.Duration { return cgtest.Patience(time.Second) }

func newSiege(t *testing.T) *siege {
	t.Helper()
	s := &siege{world: newWorld(t), stop: make(chan struct{})}
	yard := harness.NewTree(t) // not in the picture of what an attack changed
	var there sync.WaitGroup
	for i, uid := range []uint32{0, 2000} {
		cg := fmt.Sprint("witness", uid)
		yard.Make(cg, uid, uid)
		yard.Make(cg+"/sub", uid, uid)
		p := harness.Start(t, harness.Spec{UID: uid, GID: uid})
		yard.Place(p, cg)
		there.Add(1)
		s.wait.Go(func() { s.witness(p, &s.asked[i], there.Done) })
	}
	// What the daemon holds for the witnesses is no attack's doing.
	there.Wait()
	s.fds, s.threads = s.settled(), s.threadCount()
	t.Cleanup(func() {
		s.witnessed(max(0, 10-min(s.asked[0].Load(), s.asked[1].Load())))
		close(s.stop)
		s.wait.Wait()
		if hwm := s.status("VmHWM"); hwm > 64<<10 {
			t.Errorf("the daemon once had %d KiB in memory", hwm)
		}
	})
	return s
}

// left is how often a witness is said to have been answered that does not ask any more.
const left = 1 << 62

// witnessed waits until every witness has been answered so many times more.
func (s *siege) witnessed(times int64) {
	s.Helper()
	for i := range s.asked {
		then := min(s.asked[i].Load()+times, left)
		eventually(s, fmt.Sprintf("witness %d is served %d times more", i, times), func() bool { return s.asked[i].Load() >= then })
	}
}

// witness asks all the time, also on new connections, until the end of the
// siege. It calls there once it has asked for everything, or cannot.
func (s *siege) witness(p *harness.Proc, asked *atomic.Int64, there func()) {
	there = sync.OnceFunc(there)
	defer there()
	defer asked.Store(left) // whose failure is told need not be waited for
	c, err := p.Dial(s.d.Sock)
	if err != nil {
		s.Errorf("a witness cannot log in: %v", err)
		return
	}
	var worst time.Duration
	n := 0
	for ; ; n++ {
		if n == 4 {
			there()
		}
		select {
		case <-s.stop:
			c.Close()
			s.Logf("witness %d: %d requests, the slowest took %v", p.UID, n, worst)
			return
		case <-time.After(5 * time.Millisecond):
		}
		start := time.Now()
		what := "a new connection"
		switch n % 4 {
		case 0:
			var d *harness.Conn
			if d, err = p.Dial(s.d.Sock); err == nil {
				d.Close()
			}
		case 1:
			what = "GetValue"
			_, err = c.V0("GetValue", "memory", "sub", "memory.limit_in_bytes")
		case 2:
			what = "Create and Remove"
			if _, err = c.V0("Create", "freezer", "made"); err == nil {
				_, err = c.V0("Remove", "freezer", "made", int32(1))
			}
		case 3:
			what = "ListTasks"
			_, err = c.V1("ListTasks", "")
		}
		took := time.Since(start)
		worst = max(worst, took)
		if err != nil || took > patience() {
			s.Errorf("witness %d: %s took %v: %v", p.UID, what, took, err)
			if err != nil {
				return
			}
		}
		asked.Add(1)
	}
}

// settled waits until the number of the daemon's files changes only as the
// witnesses come and go.
func (s *siege) settled() int {
	n := 0
	for range 20 {
		n = max(n, s.d.FDs())
		time.Sleep(5 * time.Millisecond)
	}
	return n
}

// over fails the test unless all that the attack made the daemon hold is given
// back within the time.
func (s *siege) over(t *testing.T, within time.Duration) {
	t.Helper()
	n := 0
	if !cgtest.Until(within, 10*time.Millisecond, func() bool {
		n = s.d.FDs()
		return n <= s.fds+4
	}) {
		t.Errorf("%d files open after %v, %d before: %v", n, within, s.fds, s.d.Files())
	}
	if m := s.threadCount(); m > s.threads+16 {
		t.Errorf("%d threads, %d before", m, s.threads)
	}
	if !s.d.Alive() {
		t.Fatal("the daemon ended")
	}
}

func (s *siege) threadCount() int {
	s.Helper()
	e, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.d.PID))
	if err != nil {
		s.Error(err)
	}
	return len(e)
}

// status returns a number of the daemon's /proc/PID/status.
func (s *siege) status(field string) int {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.d.PID))
	if err != nil {
		s.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				s.Error(err)
			}
			return n
		}
	}
	return 0
}

// badArgs are for bad: what to write, each on a connection of its own.
type badArgs struct {
	Sock   string
	Inputs []input
	// Shut ends the client's side after the input: there will be no more.
	Shut bool
}

// input is Data, and then Again so many times.
type input struct {
	Data, Again []byte
	Times       int
}

// times is how often something is repeated that shows at once in most cases.
func times(n int) int {
	if testing.Short() {
		return (n + 4) / 5
	}
	return n
}

func bytesOf(b []byte) input { return input{Data: b} }

// badResult is what an input was answered with.
type badResult struct {
	Got []byte
	// Closed: the daemon closed the connection.
	Closed bool
}

var bad = harness.Inside("bad input", func(a badArgs) ([]badResult, error) {
	var all []badResult
	buf := make([]byte, 64<<10)
	for i, in := range a.Inputs {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return nil, fmt.Errorf("input %d: %w", i, err)
		}
		var r badResult
		// It may be closed already, which is what comes out below.
		r.Got, _ = harness.Begin(fd, append(in.Data, bytes.Repeat(in.Again, in.Times)...))
		if a.Shut {
			_ = unix.Shutdown(fd, unix.SHUT_WR)
		}
		for !r.Closed && len(r.Got) < 1<<20 {
			n, err := harness.Read(fd, buf)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			r.Closed = n <= 0 || errors.Is(err, unix.ECONNRESET)
			r.Got = append(r.Got, buf[:max(n, 0)]...)
		}
		unix.Close(fd)
		all = append(all, r)
	}
	return all, nil
})

// closes fails the test for every input after which the connection is open.
func (s *siege) closes(t *testing.T, p *harness.Proc, shut bool, inputs map[string]input) {
	t.Helper()
	for names := range slices.Chunk(slices.Sorted(maps.Keys(inputs)), 50) {
		a := badArgs{Sock: s.d.Sock, Shut: shut}
		for _, name := range names {
			a.Inputs = append(a.Inputs, inputs[name])
		}
		var got []badResult
		if err := p.Run(bad, a, &got); err != nil {
			t.Fatal(err)
		}
		for i, r := range got {
			if !r.Closed {
				t.Errorf("%s: the connection is still open; answered %.200q", names[i], r.Got)
			}
		}
	}
	s.over(t, 5*time.Second)
}

// attacker is root in a container of its own, in the cgroup "bad".
func (s *siege) attacker() *harness.Proc {
	s.Helper()
	return s.box("bad").Proc
}

// loggedIn is the login of a container's root, and what follows it.
func loggedIn(message []byte) input {
	return input{Data: append([]byte(login), message...)}
}

func TestKernelBadInputMessages(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	good := call(t, 1, harness.V0, "Create", "memory", "made")
	before := s.Snapshot()

	t.Run("truncated", func(t *testing.T) {
		inputs := map[string]input{}
		for n := range len(good) {
			inputs[fmt.Sprint(n, " bytes")] = loggedIn(good[:n])
		}
		for n := range len(login) - 1 {
			inputs[fmt.Sprint(n, " bytes of the login")] = bytesOf([]byte(login[:n]))
		}
		s.closes(t, p, true, inputs)
	})
	t.Run("oversized", func(t *testing.T) {
		inputs := map[string]input{}
		for _, size := range []uint32{64 << 10, 64<<10 + 1, 1 << 20, 128 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
			for name, at := range map[string]int{"body": 4, "fields": 12} {
				m := bytes.Clone(good)
				binary.LittleEndian.PutUint32(m[at:], size)
				inputs[fmt.Sprint(name, " of ", size)] = loggedIn(m)
				m = bytes.Clone(m)
				m[0] = 'B'
				binary.BigEndian.PutUint32(m[at:], size)
				inputs[fmt.Sprint("big endian ", name, " of ", size)] = loggedIn(m)
			}
		}
		big := bytes.Clone(good)
		binary.LittleEndian.PutUint32(big[4:], 64<<10)
		inputs["64 KiB and a head, all of it"] = input{append([]byte(login), big...), []byte("x"), 64 << 10}
		s.closes(t, p, false, inputs)
		if rss := s.status("VmRSS"); rss > 48<<10 {
			t.Errorf("the daemon has %d KiB in memory", rss)
		}
	})
	t.Run("malformed", func(t *testing.T) {
		inputs := map[string]input{}
		change := func(what string, at int, b ...byte) {
			m := bytes.Clone(good)
			copy(m[at:], b)
			inputs[what] = loggedIn(m)
		}
		change("no byte order", 0, 'x')
		change("NUL for a byte order", 0, 0)
		change("message type 0", 1, 0)
		change("protocol version 2", 3, 2)
		change("protocol version 0", 3, 0)
		change("serial 0", 8, 0, 0, 0, 0)
		change("a header field of another type", 17, 1, 'u', 0)
		change("a header field without a type", 17, 0, 0, 0)
		change("garbage", 0, bytes.Repeat([]byte{0xff}, 32)...)
		i := bytes.Index(good, []byte("memory\x00"))
		change("a string without its end", i+6, 'x')
		change("a NUL in a string", i+2, 0)
		change("not UTF-8", i, 0xff, 0xfe)
		change("a surrogate", i, 0xed, 0xa0, 0x80)
		change("a string longer than the body", i-4, 0xff, 0xff, 0, 0)
		change("a string of 4 GiB", i-4, 0xff, 0xff, 0xff, 0xff)
		change("a string shorter than it is", i-4, 2)
		for _, name := range []dbus.HeaderField{dbus.FieldPath, dbus.FieldMember} {
			h := fields(harness.V0, "Ping")
			delete(h, name)
			var b bytes.Buffer
			// The library refuses to write these; so does every honest one.
			m := message(t, binary.LittleEndian, 1, 0, fields(harness.V0, "Ping"), int32(0))
			b.Write(m)
			raw := b.Bytes()
			tag := map[dbus.HeaderField]string{dbus.FieldPath: "\x01\x01o", dbus.FieldMember: "\x03\x01s"}[name]
			at := bytes.Index(raw, []byte(tag))
			raw[at] = 10 // a field that nobody knows, which is passed over
			inputs[fmt.Sprintf("no header field %d", name)] = loggedIn(raw)
		}
		path := bytes.Index(good, []byte("/org/"))
		change("a path without a slash", path, 'x')
		change("a path with an empty part", path+5, '/', '/')
		change("a path that is not UTF-8", path+1, 0xff)
		member := bytes.Index(good, []byte("Create"))
		change("a member with a dot", member+1, '.')
		change("a member with a digit first", member, '1')
		sig := bytes.Index(good, []byte("\x02ss\x00"))
		change("a signature of another length", sig, 1)
		change("a signature of no type", sig+1, '!')
		change("an open struct", sig+1, '(', 's')
		change("an array of nothing", sig+1, 's', 'a')
		var variant []byte
		for range 100 {
			variant = append(variant, 1, 'v', 0)
		}
		variant = append(variant, 1, 'y', 0, 7)
		inputs["arrays in arrays"] = loggedIn(withBody(t, strings.Repeat("a", 33)+"s", make([]byte, 4)))
		inputs["structs in structs"] = loggedIn(withBody(t, strings.Repeat("(", 33)+"s"+strings.Repeat(")", 33), make([]byte, 8)))
		s.closes(t, p, false, inputs)
		// Not what Create takes, whatever is in it.
		s.closes(t, p, true, map[string]input{
			"variants in variants":   loggedIn(withBody(t, "v", variant)),
			"a signature of 255":     loggedIn(withBody(t, strings.Repeat("s", 255), nil)),
			"an array of 4 GiB":      loggedIn(withBody(t, "as", []byte{0xff, 0xff, 0xff, 0xff})),
			"an array beyond itself": loggedIn(withBody(t, "a{ss}", []byte{64, 0, 0, 0, 0, 0, 0, 0})),
		})
	})
	t.Run("mutated", func(t *testing.T) {
		// The same every time, and a thousand of them.
		r := rand.New(rand.NewPCG(1, 2))
		v1 := call(t, 2, harness.V1, "Create", "made", []string{"memory"}, map[string]string{"memory.limit": "5M"})
		inputs := map[string]input{}
		for i := range harness.Rounds(1000) {
			m := bytes.Clone([][]byte{good, v1}[i%2])
			for range 1 + r.IntN(4) {
				switch r.IntN(3) {
				case 0:
					m[r.IntN(len(m))] ^= 1 << r.IntN(8)
				case 1:
					m[r.IntN(len(m))] = byte(r.IntN(256))
				case 2:
					at := r.IntN(len(m))
					m = append(m[:at], m[min(len(m), at+1+r.IntN(8)):]...)
				}
				if len(m) == 0 {
					m = []byte{0}
				}
			}
			// What makes the message a name of its own is not of interest here.
			inputs[fmt.Sprint("mutant ", i)] = loggedIn(m)
		}
		s.closes(t, p, true, inputs)
		c := p.MustDial(s.d.Sock)
		defer c.Close()
		// Some are good requests. What they made is in the attacker's cgroup.
		r2, err := c.V1("ListChildren", "")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range r2[0].([]string) {
			if _, err := c.V1("Delete", name); err != nil {
				t.Errorf("Delete %q: %v", name, err)
			}
		}
	})
	if d := before.Diff(s.Snapshot()); len(d) > 0 {
		t.Errorf("changed:\n  %s", strings.Join(d, "\n  "))
	}
}

// withBody is a call of Create with a body that the library would not write.
func withBody(t *testing.T, signature string, body []byte) []byte {
	t.Helper()
	var m []byte
	m = append(m, 'l', 1, 0, 1)
	m = binary.LittleEndian.AppendUint32(m, uint32(len(body)))
	m = binary.LittleEndian.AppendUint32(m, 1)
	at := len(m)
	m = binary.LittleEndian.AppendUint32(m, 0)
	pad := func(n int) {
		for len(m)%n != 0 {
			m = append(m, 0)
		}
	}
	field := func(code byte, typ, val string) {
		pad(8)
		m = append(m, code, 1)
		m = append(m, typ...)
		m = append(m, 0)
		if typ == "g" {
			m = append(m, byte(len(val)))
		} else {
			pad(4)
			m = binary.LittleEndian.AppendUint32(m, uint32(len(val)))
		}
		m = append(append(m, val...), 0)
	}
	field(1, "o", objectPath)
	field(2, "s", harness.V0)
	field(3, "s", "Create")
	field(8, "g", signature)
	binary.LittleEndian.PutUint32(m[at:], uint32(len(m)-at-4))
	pad(8)
	return append(m, body...)
}

// Wrong types, and names that do not exist, are answered, and the connection
// goes on.
func TestKernelBadInputSignatures(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	r := dial(t, p, s.d.Sock)
	before := s.Snapshot()
	serial := uint32(0)
	ask := func(iface, member string, args ...any) (string, string) {
		t.Helper()
		serial++
		m := r.ask(message(t, binary.LittleEndian, serial, 0, fields(iface, member), args...))
		if m.Type != dbus.TypeError || len(m.Body) != 1 {
			t.Fatalf("%s.%s%v: %v", iface, member, args, m)
		}
		name, _ := m.Headers[dbus.FieldErrorName].Value().(string)
		return strings.TrimPrefix(name, "org.freedesktop.DBus.Error."), fmt.Sprint(m.Body[0])
	}
	for iface, members := range map[string][]string{
		harness.V0: {
			"Ping", "GetPidCgroup", "GetPidCgroupAbs", "MovePid", "MovePidAbs", "Create", "Chown", "Chmod", "GetValue", "SetValue",
			"Remove", "GetTasks", "GetTasksRecursive", "ListChildren", "RemoveOnEmpty", "Prune", "ListControllers", "ListKeys",
			"GetPidCgroupScm", "GetPidCgroupAbsScm", "MovePidScm", "MovePidAbsScm", "CreateScm", "ChownScm", "ChmodScm", "GetValueScm",
			"SetValueScm", "RemoveScm", "GetTasksScm", "GetTasksRecursiveScm", "ListChildrenScm", "RemoveOnEmptyScm", "PruneScm", "ListKeysScm",
		},
		harness.V1: {
			"ListControllers", "Create", "SetValue", "GetValue", "ListChildren", "ListTasks", "Chown", "Move", "MoveFd", "Delete", "DeleteForce", "Kill", "Delegate",
			"ListGrants", "Grant", "Revoke", "GrantLimits", "RevokeLimits",
		},
	} {
		for _, member := range members {
			for _, args := range [][]any{
				{byte(1)},
				{int64(1), "x"},
				{"x", "x", "x", "x", "x", "x"},
				{dbus.MakeVariant("memory"), "x"},
				{[]any{}},
				{3.5},
				{map[string]string{"a": "b"}},
				{struct{ A, B string }{"memory", "x"}},
				{true, true, true},
			} {
				name, text := ask(iface, member, args...)
				if name != "InvalidArgs" || text != "Invalid arguments to "+member+" method" {
					t.Errorf("%s%v: %s: %s", member, args, name, text)
				}
			}
		}
	}
	for _, iface := range []string{harness.V0, harness.V1, "no.such.Interface", "org.freedesktop.DBus"} {
		for _, member := range []string{"NoSuchMethod", "Borrow", "create", strings.Repeat("x", 255)} {
			if name, _ := ask(iface, member, "x"); name != "UnknownMethod" {
				t.Errorf("%s.%s: %s", iface, member, name)
			}
		}
	}
	if d := before.Diff(s.Snapshot()); len(d) > 0 {
		t.Errorf("changed:\n  %s", strings.Join(d, "\n  "))
	}
	if err := p.Send(r.fd, call(t, 9999, harness.V0, "Ping", int32(0)), nil); err != nil {
		t.Error(err)
	}
	r.more()
	p.Close(r.fd)
	s.over(t, 5*time.Second)
}

// Names, keys and values that no cgroup or file has: each is an error.
func TestKernelBadInputNames(t *testing.T) {
	s := newSiege(t)
	p := s.attacker()
	c := p.MustDial(s.d.Sock)
	long := strings.Repeat("x", 256)
	// What a v2 cgroup gives to its children stays given, also by a request that
	// is refused: so that is done before.
	asker{t, c}.v1("Create", "first", []string{}, map[string]string{"memory.limit": "1M", "cpus_number": "1"})
	asker{t, c}.v1("Delete", "first")
	attacks := map[string]func() error{}
	for _, name := range []string{
		"..", "a/../b", "/..", "../bad", "a/..", ".", "a/./b", "\x01", "a\nb", "a\x7fb", "a\tb", long, "a/" + long,
		strings.Repeat("d/", 20) + "d", strings.Repeat("x/", 8000) + "x",
	} {
		short := fmt.Sprintf("%.20q… (%d bytes)", name, len(name))
		attacks["old Create "+short] = func() error { return second(c.V0("Create", "memory", name)) }
		attacks["CreateScm "+short] = func() error { return scm(c, "CreateScm", "memory", name) }
		attacks["Create "+short] = func() error { return second(c.V1("Create", name, []string{}, map[string]string{})) }
		attacks["SetValue "+short] = func() error { return second(c.V1("SetValue", name, map[string]string{"memory.limit": "1M"})) }
		attacks["Delegate "+short] = func() error { return second(c.V1("Delegate", name, []string{})) }
		attacks["Move "+short] = func() error { return second(c.V1("Move", name, uint32(p.PID))) }
	}
	for _, name := range []string{"/x", "x/", "a//b", "//"} {
		attacks["Create "+name] = func() error { return second(c.V1("Create", name, []string{}, map[string]string{})) }
	}
	many := map[string]string{}
	for i := range 1000 {
		many[fmt.Sprint("key", i)] = "1"
	}
	for what, values := range map[string]map[string]string{
		"no such key": {"no.such.key": "1"}, "no key": {"": "1"}, "no value": {"memory.limit": ""}, "a thousand keys": many,
		"a negative": {"memory.limit": "-5"}, "no number": {"memory.limit": "lots"}, "an overflow": {"memory.limit": "99999999999999999999T"},
		"a newline": {"memory.limit": "1M\n2M"}, "a control character": {"memory.limit": "1\x00M"[:1] + "\x01"},
		"a long value": {"memory.limit": strings.Repeat("9", 40000)},
		"a long key":   {strings.Repeat("k", 5000): "1"}, "infinity": {"cpus_number": "inf"}, "not a number": {"cpus_fraction": "NaN"},
	} {
		attacks["Create with "+what] = func() error { return second(c.V1("Create", "v", []string{}, values)) }
	}
	for _, list := range [][]string{{"nosuch"}, {""}, {"memory", "nosuch"}, {"memory,pids"}, {"all"}, make([]string, 5000)} {
		attacks[fmt.Sprintf("Delegate in %.40q", list)] = func() error { return second(c.V1("Delegate", "c", list)) }
		attacks[fmt.Sprintf("Create in %.40q", list)] = func() error { return second(c.V1("Create", "c", list, map[string]string{})) }
	}
	for _, ctrl := range []string{"", ",", "memory,", "nosuch", "memory,nosuch", "all,memory", strings.Repeat("memory,", 5000) + "nosuch", "../memory", "name="} {
		attacks[fmt.Sprintf("old Create in %.40q", ctrl)] = func() error { return second(c.V0("Create", ctrl, "c")) }
	}
	for _, pid := range []int32{0, -1, -2147483648, 2147483647} {
		attacks[fmt.Sprint("MovePid ", pid)] = func() error { return second(c.V0("MovePid", "memory", "", pid)) }
		attacks[fmt.Sprint("GetPidCgroup ", pid)] = func() error { return second(c.V0("GetPidCgroup", "memory", pid)) }
		attacks[fmt.Sprint("Move ", pid)] = func() error { return second(c.V1("Move", "", uint32(pid))) }
	}
	s.RefusedAll(t, attacks)
	c.Close()
	s.over(t, 5*time.Second)
}

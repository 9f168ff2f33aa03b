package proxy

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"cgmanager/api"
	"cgmanager/api/wire"
)

func TestIDMap(t *testing.T) {
	m, err := parseIDMap("         0     100000      65536\n     70000       5000          1\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		in, out uint32
		ok      bool
	}{{0, 100000, true}, {65535, 165535, true}, {65536, 0, false}, {70000, 5000, true}, {70001, 0, false}, {api.NoID, 0, false}} {
		if out, ok := m.outer(tc.in); out != tc.out || ok != tc.ok {
			t.Errorf("%d: %d, %v", tc.in, out, ok)
		}
	}
	for _, bad := range []string{"0 1", "0 1 2 3", "a b c", "0 1 4294967296", "-1 0 1"} {
		if _, err := parseIDMap(bad); err == nil {
			t.Errorf("%q is a map", bad)
		}
	}
	if whole, err := parseIDMap("0 0 4294967295\n"); err != nil {
		t.Error(err)
	} else if out, ok := whole.outer(7); out != 7 || !ok {
		t.Errorf("the whole map: %d, %v", out, ok)
	}
}

// Errors of the daemon below go up as they are.
func TestRefusals(t *testing.T) {
	for _, k := range api.Kinds() {
		r := refusal{name: api.ErrorName(k), text: `Create "x": so (hint: do so)`}
		if e := r.asError("Create"); e.Kind != k || e.Error() != r.text {
			t.Errorf("%v: %v, %q", k, e.Kind, e)
		}
	}
	for text, want := range map[string]string{
		"invalid request: Create \"x\": so":  `Create "x": so`,
		"invalid request":                    "Create: the daemon below the proxy refuses, and does not say why",
		"Invalid arguments to Create method": "Invalid arguments to Create method",
	} {
		r := refusal{name: api.ErrorName(api.Invalid), text: text}
		if e := r.asError("Create"); e.Kind != api.Invalid || e.Error() != want {
			t.Errorf("%q: %v, %q", text, e.Kind, e)
		}
	}
	secret := refusal{name: "com.example.Error", text: "/var/secret"}
	if e := secret.asError("Create"); e.Kind != api.Internal || strings.Contains(e.Error(), "secret") {
		t.Errorf("an unknown error: %v, %q", e.Kind, e)
	}
	unknown := refusal{name: api.ErrorUnknownMethod}
	if e := unknown.asError("Create"); e.Kind != api.Unsupported {
		t.Errorf("an unknown method: %v", e)
	}
	unknown.realtime = true
	if e := unknown.asError("Exit"); e.Kind != api.Unsupported {
		t.Errorf("an unknown method of RealtimeKit1: %v", e)
	}
	// RealtimeKit1 has fewer errors: the kinds that it does not tell apart become
	// one of them, and the name and the text are the same again.
	for _, k := range api.Kinds() {
		name, text := api.RealtimeError(k)
		e := (&refusal{name: name, text: text, realtime: true}).asError("Exit")
		if n, s := api.RealtimeError(e.Kind); n != name || s != text {
			t.Errorf("%v: %s, %q", k, n, s)
		}
	}
	if e := (&refusal{name: "com.example.Error", text: "/var/secret", realtime: true}).asError("Exit"); e.Kind != api.Internal || strings.Contains(e.Error(), "secret") {
		t.Errorf("an unknown error of RealtimeKit1: %v, %q", e.Kind, e)
	}
}

// Every method of our interfaces is in the table by the arguments that the proxy
// writes for it; a call of one that is not would be a panic.
func TestMethods(t *testing.T) {
	p := New(Config{Lower: "/nonexistent/socket"})
	rq := &api.Request{Peer: &peer{p: p, turn: make(chan struct{}, 1)}}
	name, pid := "x", api.Victim{PID: 1}
	var busy *api.Error
	for op, err := range map[string]error{
		"ListControllers":   second(p.ListControllers(rq, nil)),
		"ListControllers s": second(p.ListControllers(rq, &name)),
		"Create":            second(p.Create(rq, "", nil, nil)),
		"SetValue":          p.SetValue(rq, "", nil),
		"GetValue":          second(p.GetValue(rq, "", nil)),
		"ListChildren":      second(p.ListChildren(rq, "")),
		"Chown":             p.Chown(rq, "", 0, 0),
		"Move":              p.Move(rq, "", 0),
		"MoveFd":            p.MoveFd(rq, "", -1),
		"Delete":            p.Delete(rq, ""),
		"DeleteForce":       p.DeleteForce(rq, ""),
		"Kill":              p.Kill(rq, ""),
		"Delegate":          second(p.Delegate(rq, "", nil)),
		"GetPidCgroup":      second(p.GetPidCgroup0(rq, "", pid)),
		"GetPidCgroupAbs":   second(p.GetPidCgroupAbs0(rq, "", pid)),
		"MovePid":           p.MovePid0(rq, "", "", pid),
		"MovePidAbs":        p.MovePidAbs0(rq, "", "", pid),
		"Create0":           second(p.Create0(rq, "", "")),
		"Chown0":            p.Chown0(rq, "", "", api.Owner{}),
		"Chmod":             p.Chmod0(rq, "", "", "", 0),
		"GetValue0":         second(p.GetValue0(rq, "", "", "")),
		"SetValue0":         p.SetValue0(rq, "", "", "", ""),
		"Remove":            second(p.Remove0(rq, "", "", true)),
		"GetTasks":          second(p.GetTasks0(rq, "", "")),
		"GetTasksRecursive": second(p.GetTasksRecursive0(rq, "", "")),
		"ListChildren0":     second(p.ListChildren0(rq, "", "")),
		"RemoveOnEmpty":     p.RemoveOnEmpty0(rq, "", ""),
		"Prune":             p.Prune0(rq, "", ""),
		"ListControllers0":  second(p.ListControllers0(rq)),
		"ListKeys":          second(p.ListKeys0(rq, "", "")),
		"ListGrants":        second(p.ListGrants(rq)),
		"Grant":             p.Grant(rq, 0, "", 0),
		"Revoke":            p.Revoke(rq, 0),
		"GrantLimits":       second(p.GrantLimits(rq, 0)),
		"RevokeLimits":      second(p.RevokeLimits(rq, 0)),
		"realtime":          p.MakeThreadRealtime(rq, api.Thread{Own: true}, 0),
		"realtime of":       p.MakeThreadRealtime(rq, api.Thread{}, 0),
		"high priority":     p.MakeThreadHighPriority(rq, api.Thread{Own: true}, 0),
		"high priority of":  p.MakeThreadHighPriority(rq, api.Thread{}, 0),
		"ResetKnown":        p.ResetKnown(rq),
		"ResetAll":          p.ResetAll(rq),
		"Exit":              p.Exit(rq),
		"properties":        second(p.RealtimeProperties(rq)),
	} {
		if !errors.As(err, &busy) || busy.Kind != api.Busy || !strings.Contains(busy.Text, "not carried out") {
			t.Errorf("%s: %v", op, err)
		}
	}
	for _, i := range api.Interfaces()[:3] {
		for _, m := range i.Methods {
			if method(i.Name, m.Name, m.InSignature()) == nil {
				t.Errorf("%s.%s is not in the table", i.Name, m.Name)
			}
		}
	}
}

func second[T any](_ T, err error) error { return err }

// FuzzReply: whatever the daemon below answers is bounded, and no answer ends the
// proxy.
func FuzzReply(f *testing.F) {
	for _, sig := range []string{"s", "i", "b", "as", "ai", "auu", "a{ss}", "a(suuu)", "au", "a(uuusixts)", "a{sv}", ""} {
		e := wire.NewReturn(nil, 1, 1, sig)
		b, err := e.End()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, sig)
	}
	f.Add(wire.AppendError(nil, 1, 1, "a.b", "text"), "s")
	f.Fuzz(func(_ *testing.T, b []byte, sig string) {
		n, err := wire.ReplySize(b)
		if err != nil || n == 0 || n > len(b) {
			return
		}
		var m wire.Message
		if m.Decode(b[:n]) != nil {
			return
		}
		d := wire.NewDecoder(string(m.Body), m.BigEndian)
		var a answer
		_ = a.decode(sig, &d)
		d = wire.NewDecoder(string(m.Body), m.BigEndian)
		d.Variant()
	})
}

// A process that has ended is not named: its number may be another's.
func TestGone(t *testing.T) {
	cmd := exec.Command("/bin/sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cred := api.Cred{PID: int32(cmd.Process.Pid)}
	h, err := hold(cred, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	c := &peer{hops: []*handle{h}, lower: &lower{}}
	if !h.alive() || c.speaks(cred) != nil {
		t.Error("it is there")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	var e *api.Error
	if err := c.speaks(cred); !errors.As(err, &e) || e.Kind != api.Denied {
		t.Errorf("speaks: %v", err)
	}
	// There is no connection: it must not get as far as to send anything.
	if err := c.passHops(); !errors.As(err, &e) || e.Kind != api.Denied {
		t.Errorf("passHops: %v", err)
	}
	if _, err := hold(cred, -1); err == nil {
		t.Error("a handle on a process that has ended")
	}
}

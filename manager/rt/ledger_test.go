package rt_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"cgmanager/manager/rt"
)

// ledgerModel is what the Ledger is to do, without a word too many.
type ledgerModel struct {
	limits  rt.Limits
	grants  map[uint64]rt.Grant
	pending map[uint64]rt.Grant
	bursts  map[string]*burst
}

type burst struct {
	began time.Time
	n     int
}

// has is what an account has, reservations included.
func (m *ledgerModel) has(account string) (threads map[rt.Thread]bool, processes map[rt.Process]bool) {
	threads, processes = map[rt.Thread]bool{}, map[rt.Process]bool{}
	for _, all := range []map[uint64]rt.Grant{m.grants, m.pending} {
		for _, g := range all {
			if slices.Contains(g.Accounts, account) {
				threads[g.Thread], processes[g.Thread.Process] = true, true
			}
		}
	}
	return threads, processes
}

func (m *ledgerModel) reserve(accounts []string, t rt.Thread) error {
	users, fresh := map[string]bool{}, 0
	for _, all := range []map[uint64]rt.Grant{m.grants, m.pending} {
		for _, g := range all {
			for _, a := range g.Accounts {
				if a[:4] == "uid:" {
					users[a] = true
				}
			}
		}
	}
	for _, a := range accounts {
		if a[:4] == "uid:" && !users[a] {
			fresh++
		}
	}
	if fresh > 0 && len(users)+fresh > m.limits.Users {
		return rt.ErrUsers
	}
	for _, a := range accounts {
		if _, p := m.has(a); !p[t.Process] && len(p) >= m.limits.Processes {
			return rt.ErrProcesses
		}
	}
	for _, a := range accounts {
		if has, _ := m.has(a); !has[t] && len(has) >= m.limits.Threads {
			return rt.ErrThreads
		}
	}
	if len(m.grants)+len(m.pending) >= m.limits.Total {
		return rt.ErrTotal
	}
	return nil
}

func (m *ledgerModel) act(accounts []string, now time.Time) error {
	for _, a := range accounts {
		if b := m.bursts[a]; b != nil && now.Sub(b.began) < m.limits.Burst && b.n >= m.limits.Actions {
			return rt.ErrBurst
		}
	}
	for _, a := range accounts {
		b := m.bursts[a]
		if b == nil || now.Sub(b.began) >= m.limits.Burst {
			b = &burst{began: now}
			m.bursts[a] = b
		}
		b.n++
	}
	return nil
}

// Whatever is asked of the Ledger, it answers as the model does, and has what the
// model has.
func TestLedgerModel(t *testing.T) {
	for range 20 {
		seed := uint64(time.Now().UnixNano())
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { ledgerAgainstModel(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func ledgerAgainstModel(t *testing.T, r *rand.Rand) {
	clock := time.Unix(1000, 0)
	limits := rt.Limits{Users: 6, Processes: 4, Threads: 7, Actions: 9, Burst: 20 * time.Second, Total: 20}
	l := rt.NewLedger(limits, func() time.Time { return clock })
	m := &ledgerModel{limits, map[uint64]rt.Grant{}, map[uint64]rt.Grant{}, map[string]*burst{}}
	reserved := map[uint64]*rt.Reservation{}
	pick := func(all map[uint64]rt.Grant) uint64 {
		ids := slices.Sorted(maps.Keys(all))
		if len(ids) == 0 {
			return 0
		}
		return ids[r.IntN(len(ids))]
	}
	chain := func() []string {
		n := r.IntN(8)
		a := []string{fmt.Sprintf("uid:%d", n)}
		if n >= 4 { // in a container, half of them in one that is in another
			a = slices.Insert(a, 0, fmt.Sprintf("user:%d", n/2))
			if n >= 6 {
				a = slices.Insert(a, 1, "user:1")
			}
		}
		return a
	}
	for range 3000 {
		clock = clock.Add(time.Duration(r.IntN(900)) * time.Millisecond)
		n := int32(r.IntN(30))
		th := rt.Thread{Process: rt.Process{PID: n / 3, Started: 1}, TID: n, ThreadStarted: uint64(r.IntN(2))}
		switch op := r.IntN(10); {
		case op < 4:
			a := chain()
			want := m.reserve(a, th)
			res, err := l.Reserve(a, th)
			if !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Fatalf("Reserve(%v, %v): %v, want %v", a, th, err, want)
			}
			if err == nil {
				reserved[res.ID()] = res
				m.pending[res.ID()] = rt.Grant{Accounts: a, Thread: th}
			}
		case op < 5:
			if id := pick(m.pending); id != 0 {
				reserved[id].Cancel()
				delete(m.pending, id)
			}
		case op < 7:
			id := pick(m.pending)
			if id == 0 {
				continue
			}
			g, before := reserved[id].Commit(rt.Grant{UID: uint32(n)})
			had := uint64(0)
			for old, o := range m.grants {
				if o.Thread == g.Thread {
					had = old
				}
			}
			if had != 0 && (before == nil || before.ID != had) || had == 0 && before != nil {
				t.Fatalf("Commit of %v replaces %v, want %d", g.Thread, before, had)
			}
			delete(m.grants, had)
			reserved[id].Cancel() // as who has reserved always does
			m.grants[id] = m.pending[id]
			delete(m.pending, id)
		case op < 8:
			id := pick(m.grants)
			if _, ok := l.Remove(id); ok != (id != 0) {
				t.Fatalf("Remove(%d): %v", id, ok)
			}
			delete(m.grants, id)
		default:
			a := chain()
			want := m.act(a, clock)
			if err := l.Act(a); !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Fatalf("Act(%v): %v, want %v", a, err, want)
			}
		}
		got := map[uint64]rt.Thread{}
		for _, g := range l.List() {
			got[g.ID] = g.Thread
			if of, ok := l.Of(g.Thread); !ok || of.ID != g.ID {
				t.Fatalf("Of(%v) is %v, want %d", g.Thread, of, g.ID)
			}
		}
		if len(got) != len(m.grants) {
			t.Fatalf("it has %v, want %v", got, m.grants)
		}
		for id, g := range m.grants {
			if got[id] != g.Thread {
				t.Fatalf("grant %d is of %v, want %v", id, got[id], g.Thread)
			}
		}
	}
}

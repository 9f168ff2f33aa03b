package watchdog

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"
)

// play is a simulated host: threads that take CPU time, a canary, and a judge that
// is asked whenever it wants to be.
type play struct {
	j         judge
	now       time.Duration
	boot      time.Duration // how far CLOCK_BOOTTIME is ahead
	load      []func(at time.Duration) float64
	used      []time.Duration
	sings     func(at time.Duration) bool
	wants     func(at time.Duration) bool // the canary wants to run
	happening []string
	wakes     int
}

const second = time.Second

func newPlay(load ...func(time.Duration) float64) *play {
	p := &play{
		j:     judge{period: 10 * second, slots: make([]slot, len(load))},
		load:  load,
		used:  make([]time.Duration, len(load)),
		sings: always, wants: always,
	}
	p.j.begin(0, 0)
	for i := range load {
		p.j.add(i, 0, 0, true, 0, granted)
	}
	return p
}

func always(time.Duration) bool { return true }
func never(time.Duration) bool  { return false }

// steady takes so much of a CPU from a time on.
func steady(share float64, from time.Duration) func(time.Duration) float64 {
	return func(at time.Duration) float64 {
		if at < from {
			return 0
		}
		return share
	}
}

// until plays on, in steps of 10 ms.
func (p *play) until(end time.Duration) {
	const step = 10 * time.Millisecond
	sang := false
	for p.now < end {
		for i, f := range p.load {
			if p.j.slots[i].state == granted {
				p.used[i] += time.Duration(f(p.now) * float64(step))
			}
		}
		sang = sang || p.sings(p.now)
		p.now += step
		if p.now >= p.j.due {
			p.look(sang)
			sang = false
		}
	}
}

func (p *play) look(sang bool) {
	p.wakes++
	for i := range p.j.slots {
		if p.j.slots[i].state != free {
			p.j.slots[i].sampled(p.now, p.used[i])
		}
	}
	v := seen{now: p.now, boot: p.now + p.boot, done: p.now, sang: sang, starving: !sang && p.wants(p.now)}
	acts := make([]act, 0, len(p.load)+2)
	for _, a := range p.j.look(v, acts) {
		name := map[EventKind]string{Demoted: "demoted", Starved: "starved", Restored: "restored", Starving: "starving", unknown: "unknown"}[a.kind]
		if a.kind == Starving || a.kind == unknown {
			a.slot = -1
		}
		p.happening = append(p.happening, fmt.Sprintf("%v %s %d", p.now, name, a.slot))
		if a.kind != Starving && a.kind != unknown && a.kind != Restored && a.used > a.window {
			panic("it took more than there is")
		}
	}
	if p.j.due <= p.now {
		panic("no next look")
	}
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		name string
		play func() *play
		end  time.Duration
		want []string
	}{
		{
			"busy from the beginning", func() *play { return newPlay(steady(1, 0)) }, 60 * second,
			[]string{"9s demoted 0"},
		},
		{"like sound", func() *play { return newPlay(steady(0.2, 0)) }, 600 * second, nil},
		{"just not too much", func() *play { return newPlay(steady(0.79, 0)) }, 600 * second, nil},
		{
			"just too much", func() *play { return newPlay(steady(0.82, 0)) }, 600 * second,
			[]string{"10s demoted 0"},
		},
		{
			"one of two", func() *play { return newPlay(steady(0.2, 0), steady(0.99, 0)) }, 60 * second,
			[]string{"9s demoted 1"},
		},
		// Idle threads are looked at every 10 s, from 1 s on. Who begins in between is
		// found within 10 s all the same.
		{
			"late, just after a look", func() *play { return newPlay(steady(1, 21*second)) }, 60 * second,
			[]string{"31s demoted 0"},
		},
		{
			"late, between", func() *play { return newPlay(steady(1, 25*second)) }, 60 * second,
			[]string{"34s demoted 0"},
		},
		{
			"late, just before a look", func() *play { return newPlay(steady(1, 29*second)) }, 60 * second,
			[]string{"38s demoted 0"},
		},
		{"a burst is not too much", func() *play {
			return newPlay(func(at time.Duration) float64 {
				return steady(1, 21*second)(at) - steady(1, 28*second)(at)
			})
		}, 60 * second, nil},
		{"a share of its own", func() *play {
			p := newPlay(steady(0.3, 0))
			p.j.add(0, 0, 0, true, 25, granted)
			return p
		}, 60 * second, []string{"9s demoted 0"}},
		{"a nice level keeps nobody from running", func() *play {
			p := newPlay(steady(1, 0))
			p.j.add(0, 0, 0, false, 0, granted)
			return p
		}, 60 * second, nil},
		{"but may have a share", func() *play {
			p := newPlay(steady(1, 0))
			p.j.add(0, 0, 0, false, 50, granted)
			return p
		}, 60 * second, []string{"6s demoted 0"}},

		{"starving because of who takes much", func() *play {
			p := newPlay(steady(0.6, 0), steady(0.5, 0), steady(0.1, 0))
			p.sings = func(time.Duration) bool { return p.j.slots[0].state != granted }
			return p
		}, 100 * second, []string{
			"10s starving -1", "10s starved 0", "10s starved 1",
			"20s restored 0", "20s restored 1",
			// Again: now they are left as they are.
			"30s starving -1", "30s starved 0", "30s starved 1",
		}},
		{"starving because of nobody we know", func() *play {
			p := newPlay(steady(0.6, 0), steady(0.1, 0))
			p.sings = func(at time.Duration) bool { return at > 25*second }
			return p
		}, 60 * second, []string{
			"10s starving -1", "10s starved 0", "11s unknown -1", "11s starved 1",
			"12s unknown -1", "13s unknown -1", "14s unknown -1", "15s unknown -1", "16s unknown -1",
			"17s unknown -1", "18s unknown -1", "19s unknown -1", "20s starving -1", "20s unknown -1",
			"21s unknown -1", "22s unknown -1", "23s unknown -1", "24s unknown -1", "25s unknown -1",
			"35s restored 0", "35s restored 1",
		}},
		{"who hogs while it starves does not get it back", func() *play {
			p := newPlay(steady(1, 0), steady(0.5, 0))
			p.sings = func(at time.Duration) bool { return p.j.slots[0].state == demoted }
			p.j.add(0, 0, 0, true, 100, granted)
			p.j.slots[0].share = 9900 * time.Millisecond
			return p
		}, 60 * second, []string{"10s starving -1", "10s starved 1", "10s demoted 0", "20s restored 1"}},
		{"stopped, the canary need not sing", func() *play {
			p := newPlay(steady(0.5, 0))
			p.sings, p.wants = never, never
			return p
		}, 100 * second, nil},
		{"nor when there is no daemon", func() *play {
			p := newPlay(steady(0.5, 0), steady(1, 50*second))
			p.sings, p.j.orphan = never, true
			return p
		}, 100 * second, []string{"59s demoted 1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := c.play()
			p.until(c.end)
			if !slices.Equal(p.happening, c.want) {
				t.Errorf("got  %q\nwant %q", p.happening, c.want)
			}
		})
	}
}

// Clocks that jump say nothing about anybody.
func TestJudgeJumps(t *testing.T) {
	for _, c := range []struct {
		name string
		jump func(p *play)
	}{
		{"suspended: only CLOCK_BOOTTIME went on", func(p *play) { p.boot += 3600 * second }},
		{"the machine stood still, all clocks went on", func(p *play) { p.now += 3600 * second }},
		{"and the CPU time of who was running", func(p *play) {
			p.now += 3600 * second
			p.used[0] += 3600 * second
		}},
		{"for less than a period", func(p *play) {
			p.now += 9 * second
			p.used[0] += 9 * second
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			// One that is all but a hog, and one that is idle.
			p := newPlay(steady(0.75, 0), steady(0, 0))
			p.until(35 * second)
			// The canary was about to sing.
			p.sings = never
			p.until(44 * second)
			c.jump(p)
			p.until(p.now + 9*second)
			p.sings = always
			p.until(p.now + 60*second)
			if len(p.happening) > 0 {
				t.Errorf("%q", p.happening)
			}
		})
	}
	t.Run("again and again", func(t *testing.T) {
		// Twice a period, and for longer than one: the hog is found when nine looks were
		// in time, and another is not, although all of it counts as its own time, too.
		p := newPlay(steady(1, 0), steady(0.2, 0))
		for range 20 {
			p.until(p.now + 4500*time.Millisecond)
			p.now += 30 * second
			for i := range p.used {
				p.used[i] += 30 * second
			}
		}
		if want := []string{"1m10.01s demoted 0"}; !slices.Equal(p.happening, want) {
			t.Errorf("got %q, want %q", p.happening, want)
		}
	})
	t.Run("while looking", func(t *testing.T) {
		p := newPlay(steady(0, 0), steady(0, 0))
		p.until(35 * second)
		p.now = p.j.due
		// The clock was read, and one sample taken; then the machine stood still; then
		// the other sample.
		stood := p.used[0] + 3600*second
		p.j.slots[0].sampled(p.now, p.used[0])
		p.j.slots[1].sampled(p.now, stood)
		if acts := p.j.look(seen{now: p.now, boot: p.now, done: p.now + 3600*second}, nil); len(acts) > 0 {
			t.Errorf("%+v", acts)
		}
		if p.j.due < p.now+3600*second {
			t.Error("the next look is in the past")
		}
		p.now, p.used[0], p.used[1] = p.now+3600*second, stood, stood
		p.until(p.now + 60*second)
		if len(p.happening) > 0 {
			t.Errorf("%q", p.happening)
		}
	})
	t.Run("what starved is given back after a jump", func(t *testing.T) {
		p := newPlay(steady(0.5, 0))
		p.sings = func(at time.Duration) bool { return at > 10*second }
		p.until(15 * second)
		p.now += 3600 * second
		p.until(p.now + 15*second)
		if len(p.happening) != 3 || p.j.slots[0].state != granted {
			t.Errorf("%q, state %d", p.happening, p.j.slots[0].state)
		}
	})
}

// An idle thread costs six looks a minute.
func TestJudgeIdle(t *testing.T) {
	p := newPlay(steady(0, 0))
	p.until(60 * second)
	before := p.wakes
	p.until(660 * second)
	if n := p.wakes - before; n > 60 {
		t.Errorf("%d looks in 10 minutes", n)
	}
}

// Who hogs is not spared for asking again and again, whatever for; who hogged while it
// was allowed to is.
func TestJudgeGrantedAnew(t *testing.T) {
	for _, c := range []struct {
		name string
		// asks are the times of grants, and whether they are of realtime.
		asks map[time.Duration]bool
		want []string
	}{
		{"nothing", nil, []string{"9s demoted 0"}},
		{"realtime", map[time.Duration]bool{3 * second: true, 6 * second: true, 8500 * time.Millisecond: true}, []string{"9s demoted 0"}},
		{"a nice level between", map[time.Duration]bool{6 * second: false, 7 * second: true}, []string{"9s demoted 0"}},
		{"a nice level for a period before", map[time.Duration]bool{0: false, 30 * second: true}, []string{"39s demoted 0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlay(steady(1, 0))
			for _, at := range slices.Sorted(maps.Keys(c.asks)) {
				p.until(at)
				before := p.j.slots[0]
				p.j.add(0, p.now, p.used[0], c.asks[at], 0, granted)
				p.j.goOn(0, &before)
			}
			p.until(60 * second)
			if !slices.Equal(p.happening, c.want) {
				t.Errorf("%q, want %q", p.happening, c.want)
			}
		})
	}
}

// Looking allocates nothing: there is no collector.
func TestLookAllocatesNothing(t *testing.T) {
	j := judge{period: second, slots: make([]slot, 100)}
	j.begin(0, 0)
	for i := range j.slots {
		j.add(i, 0, 0, true, 0, granted)
	}
	acts, now := make([]act, 0, len(j.slots)+2), time.Duration(0)
	if n := testing.AllocsPerRun(1000, func() {
		now += second / 10
		for i := range j.slots {
			j.slots[i].sampled(now, now*time.Duration(i)/100)
		}
		j.look(seen{now: now, boot: now, done: now, sang: now%2 == 0, starving: now%2 != 0}, acts)
	}); n != 0 {
		t.Errorf("%v allocations a look", n)
	}
}

func TestParseStat(t *testing.T) {
	const rest = " 1 8102 8102 0 -1 1077936384 125 0 0 0 17 4 0 0 20 0 1 0 4242 2490368 210 18446744073709551615 1 1 0 0 0 0 0 6 0 0 0 0 17 1 99 1 0 0 0 0 0 0 0 0 0 0 0\n"
	want := stat{state: 'R', flags: 1077936384, started: 4242, priority: 99, policy: 1}
	for _, name := range []string{"sh", "a b", ") S 1 2 3 4 5 6 7", "(", "\n", ""} {
		got, errno := parseStat([]byte("8102 (" + name + ") R" + rest))
		if errno != 0 || got != want {
			t.Errorf("%q: %+v, %v; want %+v", name, got, errno, want)
		}
	}
	for _, s := range []string{"", "1", "1 (a", "1 (a)", "1 (a) ", "1 (a) S", "1 (a) S 1 2 3", "1 (a) S 1 2 3 "} {
		if got, errno := parseStat([]byte(s)); errno == 0 {
			t.Errorf("%q: %+v", s, got)
		}
	}
}

func TestRecords(t *testing.T) {
	o := order{
		kind: watch, flags: wasSuspended, cheep: 1, period: 2, grace: 3,
		grant: Grant{ID: 1 << 63, PID: 2, TID: 3, Started: 1<<64 - 1, Policy: 4, Priority: 5, Nice: -15, Share: 6},
	}
	var b [orderSize]byte
	o.put(&b)
	var got order
	if got.get(b[:]); got != o {
		t.Errorf("%+v, want %+v", got, o)
	}
	r := report{event: Event{Kind: Demoted, ID: 1 << 63, Used: -1, Window: 5}, op: opLock, errno: 12}
	var c [reportSize]byte
	r.put(&c)
	var back report
	if back.get(c[:]); back != r {
		t.Errorf("%+v, want %+v", back, r)
	}
}

package rt

import (
	"context"
	"sync"
	"time"

	"cgmanager/manager/polkit"
)

// asking bounds the questions to polkit that wait for an answer: each holds up a
// request.
type asking struct {
	mu  sync.Mutex
	all int            // guarded by mu
	of  map[string]int // by account; guarded by mu
}

const (
	maxAsking        = 16
	maxAskingAccount = 2
	// polkitTimeout is how long an answer is waited for. Nobody is asked for a
	// password: it is rules that answer.
	polkitTimeout = 5 * time.Second
)

func (a *asking) begin(accounts []string) (end func(), ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.of == nil {
		a.of = make(map[string]int)
	}
	if a.all >= maxAsking {
		return nil, false
	}
	for _, name := range accounts {
		if a.of[name] >= maxAskingAccount {
			return nil, false
		}
	}
	a.all++
	for _, name := range accounts {
		a.of[name]++
	}
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.all--
		for _, name := range accounts {
			if a.of[name]--; a.of[name] == 0 {
				delete(a.of, name)
			}
		}
	}, true
}

// ask asks polkit.
func (s *Service) ask(action string, accounts []string, subject polkit.Subject) (bool, error) {
	end, ok := s.asking.begin(accounts)
	if !ok {
		return false, ErrAsking
	}
	defer end()
	ctx, cancel := context.WithTimeout(context.Background(), polkitTimeout)
	defer cancel()
	return s.polkit.Check(ctx, action, subject)
}

package manager

import "sync"

// locks are locks of things by key: who holds up one of them holds up no
// other.
type locks[K comparable] struct {
	mu   sync.Mutex
	held map[K]*keyedLock // guarded by mu
}

type keyedLock struct {
	mu    sync.Mutex
	users int // guarded by locks.mu
}

func (l *locks[K]) lock(key K) (unlock func()) {
	l.mu.Lock()
	p := l.held[key]
	if p == nil {
		if l.held == nil {
			l.held = make(map[K]*keyedLock)
		}
		p = &keyedLock{}
		l.held[key] = p
	}
	p.users++
	l.mu.Unlock()
	p.mu.Lock()
	return func() {
		p.mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if p.users--; p.users == 0 {
			delete(l.held, key)
		}
	}
}

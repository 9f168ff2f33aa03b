// Package rt grants threads realtime and high priority scheduling, and takes it
// back: who has what, within which limits (Ledger), who is given it by which rule,
// the act itself and its proof, and what is left of it for the next daemon. It
// knows nothing of requests and decides nothing about privilege: what changes a
// thread takes a privcheck.Decision.
package rt

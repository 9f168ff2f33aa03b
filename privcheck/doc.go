// Package privcheck decides who may do what, on facts that others gathered.
//
// It is pure: facts come in as plain structs, a Decision comes out. It opens
// nothing, knows no clock, and cannot print. Each question is one function and
// an ordered list of the clauses of docs/SECURITY.md; the last line denies.
// What is unknown is said explicitly (NoID, an empty path) and equals nothing.
package privcheck

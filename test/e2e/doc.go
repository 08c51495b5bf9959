// Package e2e holds the tests of whole systems: the programs as an operator
// starts them, on hosts that are network namespaces, against themselves and
// against two independent peers. All of them need root and the packages that
// scripts/setup installs; package lab makes the hosts.
package e2e

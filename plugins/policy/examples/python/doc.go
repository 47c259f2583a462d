// Package python holds no Go: it is a policy in another language, __main__.py, which
// build.sh makes a program of. Its test is the conformance suite, and proves that the
// contract asks for nothing that Go alone has.
package python
